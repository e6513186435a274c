"""Accuracy by type of question, on full tokens: where a way of training loses, and where it doesn't."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from dualspeed.reporting.figures.style import COLORS, GREY, MARKERS, empty_figure
from dualspeed.reporting.frames import Results
from dualspeed.settings.names import BENCHMARK_LABELS, METHOD_LABELS, in_paper_order


def accuracy_by_type(settings: dict[str, Any], results: Results, rows: pd.DataFrame) -> pd.DataFrame:
    """Mean over the seeds of each row of a summary: one row a `label` of benchmark and type, one column a method."""
    types = results.types[results.types["inference"] == "full"]
    means = {}
    for row in rows[rows["inference"] == "full"].itertuples():
        mine = types[types["experiment"].isin(row.experiments.split("; "))]
        means[row.method] = mine.groupby(["benchmark", "question_type"], sort=False)["accuracy"].mean()
    table = pd.DataFrame(means)
    order = in_paper_order(settings["benchmarks"])
    table = table.sort_index(key=lambda keys: [order.index(key) for key in keys], level=0, sort_remaining=False)
    alone = table.groupby(level=0).size() == 1
    labels = [
        BENCHMARK_LABELS.get(benchmark, benchmark) + ("" if alone[benchmark] else f": {kind.replace('_', ' ')}")
        for benchmark, kind in table.index
    ]
    return table.set_axis(labels, axis=0)


def draw_question_types(settings: dict[str, Any], results: Results, rows: pd.DataFrame) -> Figure:
    """One line a type of question, one marker a method; `rows` are those of `typical_rows`."""
    if results.types.empty or rows.empty:
        return empty_figure("Accuracy by question type: not run, or scored without types")
    table = accuracy_by_type(settings, results, rows)
    figure = Figure(figsize=(7.2, 1.6 + 0.3 * len(table)))
    axes = figure.subplots()
    places = range(len(table))
    axes.hlines(places, table.min(axis=1), table.max(axis=1), color=GREY, linewidth=1.5, zorder=1)
    for method in table:
        size = 110 if method == "baseline" else 42
        label = METHOD_LABELS[method]
        axes.scatter(table[method], places, size, color=COLORS[method], marker=MARKERS[method], label=label, zorder=2)
    axes.set_yticks(places, table.index)
    axes.set_ylim(len(table) - 0.4, -0.6)
    axes.set_xlim(min(50, table.min(axis=None) - 5), 102)
    axes.grid(axis="x", color="#EEEEEE")
    axes.set_xlabel("Accuracy on full tokens (%)")
    axes.set_title("Accuracy by type of question")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure
