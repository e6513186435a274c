"""Text columns that several tables share, made from the lines of a summary."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from dualspeed.reporting.summary import is_baseline, varied_settings
from dualspeed.reporting.table_format import (
    NO_RATIO,
    NOT_APPLICABLE,
    find_best,
    format_mean,
    format_number,
    format_setting,
)
from dualspeed.settings.names import BENCHMARK_LABELS, METHOD_LABELS, PRUNER_LABELS

REL = "Rel. %"


def setting_cells(summary: pd.DataFrame, leave_out: Sequence[str] = ()) -> dict[str, list[str]]:
    """Columns of the settings; model, r, l and alpha only if they vary."""
    cells = {"Model": summary["model"].map(format_setting)} if summary["model"].nunique() > 1 else {}
    cells["Method"] = summary["method"].map(METHOD_LABELS).map(format_setting)
    cells["Pruner"] = summary["pruner"].map(lambda name: format_setting(PRUNER_LABELS.get(name, name)))
    cells["p"] = summary["pruning_ratio"].map(format_setting)
    cells |= {symbol: summary[column].map(format_setting) for symbol, column in varied_settings(summary).items()}
    if "Steps" in cells:
        cells["Steps"] = summary["max_steps"].map(lambda steps: "recipe's" if pd.isna(steps) else format_setting(steps))
    return {label: list(column) for label, column in cells.items() if label not in leave_out}


def score_cells(
    summary: pd.DataFrame, benchmarks: Sequence[str], headlines: Mapping[str, str] | None = None
) -> dict[str, list[str]]:
    """Columns of the scores, their mean, and Rel. with its interval; `headlines` as in `score_columns`."""
    cells = {
        label: [format_mean(mean, std) for mean, std in zip(summary[name], summary[f"{name}_std"], strict=True)]
        for label, name in score_columns(benchmarks, headlines).items()
    }
    return cells | {REL: [format_relative(line) for line in summary.itertuples()]}


def score_columns(benchmarks: Sequence[str], headlines: Mapping[str, str] | None = None) -> dict[str, str]:
    """{label: column of a summary} of each benchmark and of their mean.

    Args:
        headlines: {benchmark: column} of those that are not shown in percent.
    """
    columns = {BENCHMARK_LABELS.get(name, name): (headlines or {}).get(name, name) for name in benchmarks}
    return columns | {"Mean": "mean"}


def best_scores(
    summary: pd.DataFrame,
    benchmarks: Sequence[str],
    group: Callable[[pd.Series], object],
    headlines: Mapping[str, str] | None = None,
) -> frozenset:
    """(row, label) of the best score of each column within each group of rows, as `find_best` defines it."""
    return find_best(summary, score_columns(benchmarks, headlines) | {REL: "rel"}, group)


def add_headlines(summary: pd.DataFrame, headlines: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, str]]:
    """Add a column, and its `_std`, for each headline that is no percentage.

    Args:
        headlines: `Results.headlines`.

    Returns:
        the longer summary, and {benchmark: column added for it}.
    """
    columns = {}
    for (benchmark, metric), found in headlines.groupby(["benchmark", "metric"]):
        values = found.set_index(["experiment", "inference"])["value"]
        by_line = [
            values.reindex([(name, line.inference) for name in line.experiments]) for line in summary.itertuples()
        ]
        columns[benchmark] = column = f"{benchmark}_{metric}"
        means, stds = [one.mean() for one in by_line], [one.std() for one in by_line]
        summary = summary.assign(**{column: means, f"{column}_std": stds})
    return summary, columns


def paper_cells(summary: pd.DataFrame, name: str, label: str) -> dict[str, list[str]]:
    """Column of the paper's numbers with their certainty; no column if the paper has none for this table."""
    if f"{name}_paper" not in summary:
        return {}
    pairs = zip(summary[f"{name}_paper"], summary[f"{name}_paper_certainty"], strict=True)
    return {label: ["" if pd.isna(value) else f"{value:g} ({certainty})" for value, certainty in pairs]}


def format_relative(line: Any) -> str:
    """Rel. of a summary's line with its interval; a Baseline on full tokens has none, its Rel. is 100 by definition.

    NO_RATIO where a Baseline scored 0 on one of the benchmarks.
    """
    if np.isinf(line.rel):
        return NO_RATIO
    if pd.isna(line.rel) or (is_baseline(line) and line.inference == "full"):
        return format_number(line.rel)
    return f"{format_mean(line.rel, line.rel_std)} [{line.rel_low:.1f}, {line.rel_high:.1f}]"


def pruning_cells(
    summary: pd.DataFrame, column: str, scale: float = 1.0, digits: int = 3, unit: str = "", never: str = ""
) -> list[str]:
    """Text of a number that only training with a pruner has: NOT_APPLICABLE for Baseline and the method `never`."""
    return [
        NOT_APPLICABLE if line.method in ("baseline", never) else format_number(scale * line[column], digits, unit)
        for _, line in summary.iterrows()
    ]


def time_unit(seconds: pd.Series) -> tuple[str, float]:
    """(symbol, seconds in it) of the unit for a column of times: hours if the longest takes one, else minutes."""
    return ("h", 3600.0) if seconds.max() >= 3600 else ("min", 60.0)
