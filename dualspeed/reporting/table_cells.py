"""Columns that tables share, as text, from the rows of a summary."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from dualspeed.reporting.summary import is_reference, varied_settings
from dualspeed.reporting.table_format import NOT_APPLICABLE, find_best, format_mean, format_number, format_setting
from dualspeed.settings.names import BENCHMARK_LABELS, METHOD_LABELS, PRUNER_LABELS

REL = "Rel. %"


def setting_cells(rows: pd.DataFrame, leave_out: Sequence[str] = ()) -> dict[str, list[str]]:
    """Columns that say what was trained; model, r, l and alpha only where they vary."""
    cells = {"Model": rows["model"].map(format_setting)} if rows["model"].nunique() > 1 else {}
    cells["Method"] = rows["method"].map(METHOD_LABELS).map(format_setting)
    cells["Pruner"] = rows["pruner"].map(lambda name: format_setting(PRUNER_LABELS.get(name, name)))
    cells["p"] = rows["pruning_ratio"].map(format_setting)
    cells |= {symbol: rows[column].map(format_setting) for symbol, column in varied_settings(rows).items()}
    return {label: list(column) for label, column in cells.items() if label not in leave_out}


def score_cells(
    rows: pd.DataFrame, benchmarks: list[str], headlines: Mapping[str, str] | None = None
) -> dict[str, list[str]]:
    """Columns of scores, their mean and Rel. with its interval; `headlines` as in `score_columns`."""
    cells = {
        label: [format_mean(mean, std) for mean, std in zip(rows[name], rows[f"{name}_std"], strict=True)]
        for label, name in score_columns(benchmarks, headlines).items()
    }
    return cells | {REL: [format_relative(row) for row in rows.itertuples()]}


def score_columns(benchmarks: list[str], headlines: Mapping[str, str] | None = None) -> dict[str, str]:
    """{label: column of a summary} of the benchmarks, some by the column that `headlines` names, and their mean."""
    return {BENCHMARK_LABELS.get(name, name): (headlines or {}).get(name, name) for name in benchmarks} | {
        "Mean": "mean"
    }


def best_scores(
    rows: pd.DataFrame,
    benchmarks: list[str],
    group: Callable[[pd.Series], object],
    headlines: Mapping[str, str] | None = None,
) -> frozenset:
    """The best score of each column among the rows of a `group` (see `find_best`)."""
    return find_best(rows, score_columns(benchmarks, headlines) | {REL: "rel"}, group)


def add_headlines(rows: pd.DataFrame, headlines: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, str]]:
    """A summary with a column, and its `_std`, of each headline that is no percentage: (rows, {benchmark: column})."""
    columns = {}
    for (benchmark, metric), found in headlines.groupby(["benchmark", "metric"]):
        values = found.set_index(["experiment", "inference"])["value"]
        chosen = [
            values.reindex([(name, row.inference) for name in str(row.experiments).split("; ")])
            for row in rows.itertuples()
        ]
        columns[benchmark] = column = f"{benchmark}_{metric}"
        rows = rows.assign(
            **{column: [part.mean() for part in chosen], f"{column}_std": [part.std() for part in chosen]}
        )
    return rows, columns


def paper_cells(rows: pd.DataFrame, name: str, label: str) -> dict[str, list[str]]:
    """One column of the paper's numbers with their certainty, empty where it gives none; none at all without any."""
    if f"{name}_paper" not in rows:
        return {}
    pairs = zip(rows[f"{name}_paper"], rows[f"{name}_paper_certainty"], strict=True)
    return {label: ["" if pd.isna(value) else f"{value:g} ({certainty})" for value, certainty in pairs]}


def format_relative(row: Any) -> str:
    """Rel. of a summary's row with its interval; the Baseline's is 100 by definition and has none."""
    if pd.isna(row.rel) or (is_reference(row) and row.inference == "full"):
        return format_number(row.rel)
    return f"{format_mean(row.rel, row.rel_std)} [{row.rel_low:.1f}, {row.rel_high:.1f}]"


def pruning_cells(
    rows: pd.DataFrame, column: str, scale: float = 1.0, digits: int = 3, unit: str = "", never: str = ""
) -> list[str]:
    """A number that only models have which prune in training, those of the method `never` excepted."""
    return [
        NOT_APPLICABLE if row.method in ("baseline", never) else format_number(scale * row[column], digits, unit)
        for _, row in rows.iterrows()
    ]


def time_unit(seconds: pd.Series) -> tuple[str, float]:
    """Hours if anything takes one, else minutes, with the unit's seconds."""
    return ("h", 3600.0) if seconds.max() >= 3600 else ("min", 60.0)
