"""Figure of the accuracy by type of question, on full tokens."""

import pandas as pd
from matplotlib.figure import Figure

from dualspeed.reporting.figures.style import COLORS, GREY, MARKERS, empty_figure
from dualspeed.reporting.frames import Results
from dualspeed.settings.names import BENCHMARK_LABELS, METHOD_LABELS


def accuracy_by_type(results: Results, summary: pd.DataFrame) -> pd.DataFrame:
    """Mean accuracy over the seeds, in percent: a row for each benchmark and type of question, a column a method."""
    types = results.types[results.types["inference"] == "full"]
    means = {}
    for line in summary[summary["inference"] == "full"].itertuples():
        of_line = types[types["experiment"].isin(line.experiments)]
        means[line.method] = of_line.groupby(["benchmark", "question_type"], sort=False)["accuracy"].mean()
    table = pd.DataFrame(means)
    order = results.benchmarks
    table = table.sort_index(key=lambda keys: [order.index(key) for key in keys], level=0, sort_remaining=False)
    alone = table.groupby(level=0).size() == 1
    labels = [
        BENCHMARK_LABELS.get(benchmark, benchmark) + ("" if alone[benchmark] else f": {kind.replace('_', ' ')}")
        for benchmark, kind in table.index
    ]
    return table.set_axis(labels, axis=0)


def draw_question_types(results: Results, summary: pd.DataFrame) -> Figure:
    """A line for each type of question with a marker for each method; `summary` as from `typical_rows`."""
    if results.types.empty or summary.empty:
        return empty_figure("Accuracy by question type: not run, or scored without types")
    table = accuracy_by_type(results, summary)
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
