"""Rows of Table 3: the line of the paper's ablation that each row's settings make."""

import math
from collections.abc import Iterable, Sequence

import pandas as pd

from dualspeed.reporting.summary import summary_columns
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
