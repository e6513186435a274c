"""Summary of a sheet's rows: one line for all rows that differ only in their seed; tables and figures show these lines.

A summary is a DataFrame. Its columns: `model`, `method`, SETTINGS (pruner and pruning ratio empty for a Baseline),
`inference`, `num_seeds` and `experiments` (a tuple of the rows' ids); mean and standard deviation over the seeds (with
the ending `_std`) of each benchmark, of the benchmarks' `mean` and of `rel`; `rel_low` and `rel_high`, the 95 %
interval of `rel`, which are inf where a Baseline scored 0 on a benchmark; MEANS; and `not_run` (missing scores, a tuple
of "row: benchmark"). A value that doesn't exist yet is NaN.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from dualspeed.evaluation.bootstrap import interval_of, relative
from dualspeed.reporting.frames import Results
from dualspeed.settings.method import DualSpeedConfig
from dualspeed.settings.names import METHOD_LABELS, averaged
from dualspeed.settings.sheet import Row, Sheet

METHODS = tuple(METHOD_LABELS)  # in the paper's order
PRUNERS = ("divprune", "fastervlm", "cdpruner")  # in the paper's order; others follow by name
SETTINGS = [
    *["pruner", "pruning_ratio", "slow_mode_ratio", "slow_steps"],  # one of the last two is None
    *["num_virtual_tokens", "distillation_weight", "max_steps"],
]
DEFAULTS: dict[str, Any] = {name: getattr(DualSpeedConfig(), name, None) for name in SETTINGS}
"""Name of a setting -> the paper's value; None of `max_steps`: the recipe's."""
MEANS = [
    *["speedup_measured", "speedup_theory", "pretrain_seconds", "finetune_seconds", "train_hours", "pruner_share"],
    *["fast_step_seconds", "slow_step_seconds", "baseline_step_seconds", "fast_flops_share"],
    *["samples_per_second", "peak_memory_bytes", "gpu_hours"],
]


def summarise_table(results: Results, table: str) -> pd.DataFrame:
    """Summary of the rows that a table or figure shows."""
    return summarise(results, [row for row in results.sheet.rows if table in row.tables])


def summarise(results: Results, rows: Iterable[Row]) -> pd.DataFrame:
    """Summary of some of the sheet's rows: a line for each setting and inference, in the paper's order."""
    costs = results.speed.set_index("experiment").join(results.costs.set_index("experiment"))
    lines = []
    for group in _group_by_settings(results.sheet, rows):
        ids = tuple(row.id for row in group)
        for inference in ("full", "pruned"):
            if any(inference in row.inferences for row in group):
                line = _settings_of(group[0]) | {"inference": inference, "num_seeds": len(group), "experiments": ids}
                line |= _mean_scores(results, group, inference) | _mean_relative(results, group, inference)
                lines.append(line | costs.loc[list(ids), MEANS].astype(float).mean().to_dict())
    return pd.DataFrame(lines, columns=summary_columns(results.benchmarks))


def usual_settings(summary: pd.DataFrame) -> dict[str, Any]:
    """Most frequent value of each of SETTINGS among the DualSpeed rows; the paper's default where there is a tie."""
    dualspeed = summary[(summary["method"] == "dualspeed") & (summary["inference"] == "full")]
    usual: dict[str, Any] = {}
    for name in SETTINGS:
        default = DEFAULTS[name]
        rows = dualspeed
        if name == "slow_steps":  # a number goes with no share, and a share with no number
            rows = rows[has_setting(rows, "slow_mode_ratio", usual["slow_mode_ratio"])]
        counts: Counter = Counter()
        for value, num_seeds in zip(rows[name], rows["num_seeds"], strict=True):
            counts[None if pd.isna(value) else value] += num_seeds
        most = [value for value, count in counts.items() if count == max(counts.values())]
        usual[name] = default if default in most else max(most, key=_none_first)
    return usual


def has_setting(summary: pd.DataFrame, name: str, value: Any) -> pd.Series:
    """Mask of the lines whose setting `name` is `value`, which may be None."""
    return summary[name].isna() if value is None else summary[name] == value


def typical_rows(summary: pd.DataFrame) -> pd.DataFrame:
    """One line of each method: the first model's, with the usual settings."""
    summary = summary[summary["model"] == summary["model"].iloc[0]] if len(summary) else summary
    usual = usual_settings(summary) if (summary["method"] == "dualspeed").any() else {}
    keep = summary["method"] == "baseline"
    for method, names in {"naive_prune": SETTINGS[:2], "dualspeed": SETTINGS}.items():
        matches = summary["method"] == method
        for name in names if usual else ():
            matches &= has_setting(summary, name, usual[name])
        keep |= matches
    return summary[keep]


def rows_in(sheet: Sheet, summary: pd.DataFrame) -> list[Row]:
    """The sheet's rows that the lines of a summary are means of."""
    ids = {name for names in summary["experiments"] for name in names}
    return [row for row in sheet.rows if row.id in ids]


def summary_columns(benchmarks: Sequence[str]) -> list[str]:
    """Columns of a summary, in order."""
    scores = [column for name in [*benchmarks, "mean", "rel"] for column in (name, f"{name}_std")]
    identity = ["model", "method", *SETTINGS, "inference", "num_seeds", "experiments"]
    return [*identity, *scores, "rel_low", "rel_high", *MEANS, "not_run"]


def with_baseline(sheet: Sheet, rows: Iterable[Row]) -> list[tuple[str, str]]:
    """(id, id of its Baseline) of each row that has one, of the same model and seed.

    The Baseline is as long as the row; if there is none, as long as the recipe says.
    """
    baselines = {(row.model, row.seed, row.max_steps): row.id for row in sheet.rows if row.method == "baseline"}
    found = []
    for row in rows:
        for max_steps in (row.max_steps, None):
            if (key := (row.model, row.seed, max_steps)) in baselines:
                found.append((row.id, baselines[key]))
                break
    return found


def varied_settings(summary: pd.DataFrame) -> dict[str, str]:
    """{symbol: column} of r, slow steps, l and alpha, each if the DualSpeed rows differ in it; steps, if any do."""
    symbols = {
        "r": "slow_mode_ratio",
        "Slow steps": "slow_steps",
        "l": "num_virtual_tokens",
        "alpha": "distillation_weight",
        "Steps": "max_steps",
    }
    dualspeed = summary[summary["method"] == "dualspeed"]
    rows = {column: summary if column == "max_steps" else dualspeed for column in symbols.values()}
    return {symbol: column for symbol, column in symbols.items() if rows[column][column].nunique(dropna=False) > 1}


def slow_steps_of(line: Any) -> str:
    """How many of the steps of a summary's line are slow: a share, or a number."""
    return f"r = {line.slow_mode_ratio:g}" if pd.isna(line.slow_steps) else f"{line.slow_steps:g} slow steps"


def is_baseline(line: Any) -> bool:
    """True if a line of a summary is a Baseline's."""
    return line.method == "baseline"


def _group_by_settings(sheet: Sheet, rows: Iterable[Row]) -> list[list[Row]]:
    """Rows that differ only in their seed, together; groups in the paper's order."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(_settings_of(row).values()), []).append(row)
    models = [row.model for row in sheet.rows]
    return sorted(groups.values(), key=lambda group: _paper_order(group[0], models))


def _paper_order(row: Row, models: list[str]) -> tuple:
    pruner = row.dualspeed.pruner
    rank = PRUNERS.index(pruner) if pruner in PRUNERS else len(PRUNERS)
    numbers = [_none_first(_settings_of(row)[name]) for name in SETTINGS[1:]]
    return models.index(row.model), METHODS.index(row.method), rank, pruner, *numbers


def _none_first(value: Any) -> tuple[bool, Any]:
    """Key that sorts values of a setting, None before all others."""
    return value is not None, value


def _settings_of(row: Row) -> dict[str, Any]:
    settings = {name: getattr(row.dualspeed, name, row.max_steps) for name in SETTINGS} | row.slow_settings
    if row.method == "baseline":
        settings |= {"pruner": None, "pruning_ratio": None}
    return {"model": row.model, "method": row.method} | settings


def _mean_scores(results: Results, group: list[Row], inference: str) -> dict[str, Any]:
    benchmarks, missing = results.benchmarks, np.array([np.nan])
    table = np.array(
        [[results.draws.get((row.id, inference, name), missing)[0] for name in benchmarks] for row in group]
    )
    mean = table[:, [name in averaged(benchmarks) for name in benchmarks]].mean(axis=1)
    line: dict[str, Any] = {}
    for name, values in zip([*benchmarks, "mean"], [*table.T, mean], strict=True):
        line |= _mean_and_std(name, values)
    not_run = [
        f"{row.id}: {name}"
        for row, values in zip(group, table, strict=True)
        for name, value in zip(benchmarks, values, strict=True)
        if np.isnan(value)
    ]
    return line | {"not_run": tuple(not_run)}


def _mean_relative(results: Results, group: list[Row], inference: str) -> dict[str, float]:
    rel = relative(results.draws, with_baseline(results.sheet, group), inference, averaged(results.benchmarks))
    if rel is None:
        return {}
    low, high = interval_of(rel.mean(axis=0))
    return _mean_and_std("rel", rel[:, 0]) | {"rel_low": low, "rel_high": high}


def _mean_and_std(name: str, values: np.ndarray) -> dict[str, float]:
    """Mean of the values that exist; their sample standard deviation if there are at least two."""
    values = values[~np.isnan(values)]
    return {
        name: values.mean() if len(values) else np.nan,
        f"{name}_std": values.std(ddof=1) if len(values) > 1 and np.isfinite(values).all() else np.nan,
    }
