"""The rows of Table 3: which settings are which line of the paper's ablation."""

from typing import Any

import pandas as pd

from dualspeed.reporting.summary import summary_columns

STEPS = ("NaivePrune", "+ fast and slow modes", "+ mode isolator", "+ self-distillation")


def ablation_step(method: str, num_virtual_tokens: int, distillation_weight: float) -> int | None:
    """Line of STEPS that these settings are, None if they are none of them."""
    if method != "dualspeed":
        return 0 if method == "naive_prune" else None
    parts = (num_virtual_tokens > 0, distillation_weight > 0)
    return {(False, False): 1, (True, False): 2, (True, True): 3}.get(parts)


def keep_common_seeds(settings: dict[str, Any]) -> dict[str, Any]:
    """`settings` with Table 3 cut down to the seeds that all of its lines have: a seed can matter more than a part."""
    steps: dict[int, set[int]] = {}
    for one in settings["experiments"]:
        config = one["dualspeed"]
        step = ablation_step(one["method"], config["num_virtual_tokens"], config["distillation_weight"])
        if "table3" in one["tables"] and step is not None:
            steps.setdefault(step, set()).add(one["seed"])
    common = set.intersection(*steps.values()) if steps else set()
    kept = [one if one["seed"] in common else one | {"tables": []} for one in settings["experiments"]]
    return settings | {"experiments": kept if common else settings["experiments"]}


def ablation_rows(rows: pd.DataFrame, benchmarks: list[str]) -> pd.DataFrame:
    """Rows of a summary that are steps of the ablation, by `step`; a step that no experiment makes is an empty row."""
    parts = []
    for step in range(len(STEPS)):
        found = [
            row | {"step": step}
            for row in rows.to_dict("records")
            if ablation_step(row["method"], row["num_virtual_tokens"], row["distillation_weight"]) == step
        ]
        parts += found or [{"num_seeds": 0, "step": step}]
    return pd.DataFrame(parts, columns=[*summary_columns(benchmarks), "step"])


def gains(rows: pd.DataFrame) -> list[float | None]:
    """Change of Rel. of each row against the step before; None for the first step, NaN where it isn't known.

    It is known where the step before is one row and both have a Rel.
    """
    found = []
    for row in rows.itertuples():
        before = rows["rel"][rows["step"] == row.step - 1]
        known = row.rel - before.iloc[0] if len(before) == 1 else float("nan")
        found.append(None if row.step == 0 else known)
    return found
