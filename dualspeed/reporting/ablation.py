"""Rows of Table 3: the line of the paper's ablation that each row's settings make."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from dualspeed.evaluation.bootstrap import paired_interval, relative
from dualspeed.reporting.frames import Results
from dualspeed.reporting.summary import slow_steps_of, summary_columns, with_baseline
from dualspeed.settings.names import averaged
from dualspeed.settings.sheet import Row

STEPS = ("NaivePrune", "+ fast and slow modes", "+ mode isolator", "+ self-distillation")


def ablation_step(method: str, num_virtual_tokens: int, distillation_weight: float) -> int | None:
    """Index into STEPS of these settings; None if the ablation has no such line."""
    if method != "dualspeed":
        return 0 if method == "naive_prune" else None
    has_isolator, has_teacher = num_virtual_tokens > 0, distillation_weight > 0
    return {(False, False): 1, (True, False): 2, (True, True): 3}.get((has_isolator, has_teacher))


def keep_common_seeds(rows: Iterable[Row]) -> list[Row]:
    """Rows of the seeds that all lines of Table 3 have: a seed can change more than a part of the method does.

    All rows where the lines have no seed in common.
    """
    rows = list(rows)
    seeds: dict[int, set[int]] = {}
    for row in rows:
        step = ablation_step(row.method, row.dualspeed.num_virtual_tokens, row.dualspeed.distillation_weight)
        if step is not None:
            seeds.setdefault(step, set()).add(row.seed)
    common = set.intersection(*seeds.values()) if seeds else set()
    return [row for row in rows if row.seed in common] if common else rows


def ablation_rows(summary: pd.DataFrame, benchmarks: Sequence[str]) -> pd.DataFrame:
    """Lines of a summary that are steps of the ablation, with their `step`; an empty line for a step without any."""
    lines = []
    for step in range(len(STEPS)):
        found = [
            line | {"step": step}
            for line in summary.to_dict("records")
            if ablation_step(line["method"], line["num_virtual_tokens"], line["distillation_weight"]) == step
        ]
        lines += found or [{"num_seeds": 0, "step": step}]
    return pd.DataFrame(lines, columns=[*summary_columns(benchmarks), "step"])


def gains(rows: pd.DataFrame) -> list[float | None]:
    """Change of Rel. of each line against the step before; None for the first step.

    NaN if either Rel. is missing, or if the step before has several lines; inf if a Baseline scored 0.
    """
    found = []
    for line in rows.itertuples():
        before = rows["rel"][rows["step"] == line.step - 1]
        known = float("nan")
        if len(before) == 1:
            both = line.rel, before.iloc[0]
            known = math.inf if math.inf in both and not any(map(math.isnan, both)) else both[0] - both[1]
        found.append(None if line.step == 0 else known)
    return found


def gain_intervals(rows: pd.DataFrame, results: Results) -> list[np.ndarray | None]:
    """95 % interval of each of `gains`, paired over seeds and questions; None without a gain, or a common seed."""
    found: list[np.ndarray | None] = []
    for line, gain in zip(rows.itertuples(), gains(rows), strict=True):
        interval = None
        if gain is not None and math.isfinite(gain):
            (before,) = rows["experiments"][rows["step"] == line.step - 1]
            interval = _interval_between(results, before, line.experiments)
        found.append(interval)
    return found


def _interval_between(results: Results, first: Iterable[str], second: Iterable[str]) -> np.ndarray | None:
    """Interval of the difference in Rel. of two lines' experiments, over the seeds that both have scores of."""
    by_seed = [{row.seed: row for row in results.sheet.rows if row.id in set(ids)} for ids in (first, second)]
    draws = [_relative_by_seed(results, rows) for rows in by_seed]
    seeds = sorted(draws[0].keys() & draws[1].keys())
    return paired_interval(*(np.stack([one[seed] for seed in seeds]) for one in draws)) if seeds else None


def _relative_by_seed(results: Results, rows: dict[int, Row]) -> dict[int, np.ndarray]:
    """Seed -> (1 + RESAMPLES,) Rel. of the row with that seed, where it can be told."""
    found = {
        seed: relative(results.draws, with_baseline(results.sheet, [row]), "full", averaged(results.benchmarks))
        for seed, row in rows.items()
    }
    return {seed: draws[0] for seed, draws in found.items() if draws is not None}


def significance(rows: pd.DataFrame, intervals: Sequence[np.ndarray | None]) -> str:
    """Sentences that say which changes are significant: those whose interval leaves out 0."""
    names: dict[str, list[str]] = {"significant": [], "not significant": []}
    for line, interval in zip(rows.itertuples(), intervals, strict=True):
        if interval is not None:
            others = (rows["step"] == line.step).sum() > 1
            verdict = "not significant" if interval[0] <= 0 <= interval[1] else "significant"
            names[verdict].append(STEPS[line.step] + (f" ({slow_steps_of(line)})" if others else ""))
    told = [f"{', '.join(some)}: {verdict}." for verdict, some in names.items() if some]
    return " ".join(told) or "No change has an interval yet."
