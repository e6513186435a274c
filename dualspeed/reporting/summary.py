"""Experiments that differ only in their seed, summarised in one row: the numbers behind each table and figure."""

from typing import Any

import numpy as np
import pandas as pd

from dualspeed.evaluation.bootstrap import Cell, relative
from dualspeed.reporting.frames import Results
from dualspeed.reporting.paper import DEFAULTS
from dualspeed.settings.names import averaged

METHODS = ("baseline", "naive_prune", "dualspeed")  # in the paper's order
PRUNERS = ("divprune", "fastervlm", "cdpruner")  # likewise; others follow by name
SETTINGS = ["pruner", "pruning_ratio", "slow_mode_ratio", "num_virtual_tokens", "distillation_weight"]
MEANS = [
    *["speedup_measured", "speedup_theory", "pretrain_seconds", "finetune_seconds", "train_hours", "pruner_share"],
    *["fast_step_seconds", "slow_step_seconds", "baseline_step_seconds", "fast_flops_share"],
    *["samples_per_second", "peak_memory_bytes", "gpu_hours"],
]


def summarise(settings: dict[str, Any], results: Results, scores: dict[Cell, np.ndarray], table: str) -> pd.DataFrame:
    """One row per group of experiments shown in `table` and per inference, in the paper's order.

    Columns: model, method, SETTINGS (pruner and ratio empty for a Baseline), inference, num_seeds and the ids of the
    `experiments`; mean and `_std` over
    the seeds of each benchmark, of their `mean` and of `rel`; `rel_low` and `rel_high`; MEANS; and `not_run`, which
    lists what is missing. What has not run is NaN. `scores` come from `resample_scores`.
    """
    benchmarks = list(settings["benchmarks"])
    costs = results.speed.set_index("experiment").join(results.costs.set_index("experiment"))
    rows = []
    for members in _groups(settings, table):
        for inference in ("full", "pruned"):
            if any(inference in member["inferences"] for member in members):
                row = _describe(members[0]) | {"inference": inference, "num_seeds": len(members)}
                row["experiments"] = "; ".join(member["id"] for member in members)
                row |= _mean_scores(members, inference, benchmarks, scores)
                row |= _mean_relative(settings, members, inference, benchmarks, scores)
                row |= costs.loc[[member["id"] for member in members], MEANS].astype(float).mean().to_dict()
                rows.append(row)
    return pd.DataFrame(rows, columns=summary_columns(benchmarks))


def summarise_all(settings: dict[str, Any], results: Results, scores: dict[Cell, np.ndarray]) -> pd.DataFrame:
    """`summarise` of every experiment of the sheet, whatever tables show it."""
    shown = [one | {"tables": ["all"]} for one in settings["experiments"]]
    return summarise(settings | {"experiments": shown}, results, scores, "all")


def usual_settings(rows: pd.DataFrame) -> dict[str, Any]:
    """Value of each of SETTINGS that most DualSpeed experiments of a summary have; the paper's where that is a tie."""
    dualspeed = rows[(rows["method"] == "dualspeed") & (rows["inference"] == "full")]
    usual = {}
    for name in SETTINGS:
        counts = dualspeed.groupby(name)["num_seeds"].sum()
        most = list(counts.index[counts == counts.max()])
        usual[name] = DEFAULTS[name] if DEFAULTS[name] in most else most[-1]
    return usual


def typical_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Of the rows of a summary, one of each method: those of the first model with the usual settings."""
    rows = rows[rows["model"] == rows["model"].iloc[0]] if len(rows) else rows
    usual = usual_settings(rows) if (rows["method"] == "dualspeed").any() else {}
    keep = rows["method"] == "baseline"
    for method, names in {"naive_prune": SETTINGS[:2], "dualspeed": SETTINGS}.items():
        matches = rows["method"] == method
        for name in names if usual else ():
            matches &= rows[name] == usual[name]
        keep |= matches
    return rows[keep]


def members_of(settings: dict[str, Any], rows: pd.DataFrame) -> list[dict[str, Any]]:
    """The experiments that rows of a summary are means of."""
    names = {name for names in rows["experiments"] for name in names.split("; ")}
    return [one for one in settings["experiments"] if one["id"] in names]


def summary_columns(benchmarks: list[str]) -> list[str]:
    """Columns of a summary, in order."""
    scores = [column for name in [*benchmarks, "mean", "rel"] for column in (name, f"{name}_std")]
    identity = ["model", "method", *SETTINGS, "inference", "num_seeds", "experiments"]
    return [*identity, *scores, "rel_low", "rel_high", *MEANS, "not_run"]


def baseline_pairs(settings: dict[str, Any], members: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(experiment, Baseline of the same model and seed) for those members that have one."""
    baselines = {(one["model"], one["seed"]): one["id"] for one in settings["experiments"] if is_baseline(one)}
    keys = {member["id"]: (member["model"], member["seed"]) for member in members}
    return [(name, baselines[key]) for name, key in keys.items() if key in baselines]


def varied_settings(rows: pd.DataFrame) -> dict[str, str]:
    """{symbol: column} of those settings beside pruner and p in which the DualSpeed rows of a summary differ."""
    symbols = {"r": "slow_mode_ratio", "l": "num_virtual_tokens", "alpha": "distillation_weight"}
    dualspeed = rows[rows["method"] == "dualspeed"]
    return {symbol: column for symbol, column in symbols.items() if dualspeed[column].nunique() > 1}


def is_baseline(experiment: dict[str, Any]) -> bool:
    """Whether an experiment was trained on full tokens alone."""
    return experiment["method"] == "baseline"


def is_reference(row: Any) -> bool:
    """Whether a row of a summary is a Baseline."""
    return row.method == "baseline"


def _groups(settings: dict[str, Any], table: str) -> list[list[dict[str, Any]]]:
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for experiment in settings["experiments"]:
        if table in experiment["tables"]:
            groups.setdefault(tuple(_describe(experiment).values()), []).append(experiment)
    models = [experiment["model"] for experiment in settings["experiments"]]
    return sorted(groups.values(), key=lambda members: _order(members[0], models))


def _order(experiment: dict[str, Any], models: list[str]) -> tuple:
    config = experiment["dualspeed"]
    pruner = config["pruner"]
    rank = PRUNERS.index(pruner) if pruner in PRUNERS else len(PRUNERS)
    numbers = [config[name] for name in SETTINGS[1:]]
    return models.index(experiment["model"]), METHODS.index(experiment["method"]), rank, pruner, *numbers


def _describe(experiment: dict[str, Any]) -> dict[str, Any]:
    config = {name: experiment["dualspeed"][name] for name in SETTINGS}
    if is_baseline(experiment):
        config |= {"pruner": None, "pruning_ratio": None}
    return {"model": experiment["model"], "method": experiment["method"]} | config


def _mean_scores(
    members: list[dict[str, Any]], inference: str, benchmarks: list[str], scores: dict[Cell, np.ndarray]
) -> dict[str, Any]:
    missing = np.array([np.nan])
    table = np.array(
        [[scores.get((member["id"], inference, name), missing)[0] for name in benchmarks] for member in members]
    )
    mean = table[:, [name in averaged(benchmarks) for name in benchmarks]].mean(axis=1)
    row: dict[str, Any] = {}
    for name, values in zip([*benchmarks, "mean"], [*table.T, mean], strict=True):
        row |= _mean_and_std(name, values)
    absent = [
        f"{member['id']}: {name}"
        for member, values in zip(members, table, strict=True)
        for name, value in zip(benchmarks, values, strict=True)
        if np.isnan(value)
    ]
    return row | {"not_run": "; ".join(absent)}


def _mean_relative(
    settings: dict[str, Any],
    members: list[dict[str, Any]],
    inference: str,
    benchmarks: list[str],
    scores: dict[Cell, np.ndarray],
) -> dict[str, float]:
    found = relative(scores, baseline_pairs(settings, members), inference, averaged(benchmarks))
    if found is None:
        return {}
    low, high = np.percentile(found.mean(axis=0)[1:], [2.5, 97.5])
    return _mean_and_std("rel", found[:, 0]) | {"rel_low": low, "rel_high": high}


def _mean_and_std(name: str, values: np.ndarray) -> dict[str, float]:
    """Mean of what has run and, from two values on, its sample standard deviation."""
    values = values[~np.isnan(values)]
    return {
        name: values.mean() if len(values) else np.nan,
        f"{name}_std": values.std(ddof=1) if len(values) > 1 else np.nan,
    }
