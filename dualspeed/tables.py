"""The paper's tables, filled with what a sheet's experiments have given so far.

Table 1: methods and pruners on all benchmarks, with Rel., speed and cost. Table 2: the same models on full tokens and
on pruned ones, where training and inference do not match. Table 3: what each part of DualSpeed adds. A cell whose job
has not run says so, and is empty in the csv.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dualspeed.figures import write_figures
from dualspeed.labels import BENCHMARK_LABELS, METHOD_LABELS, PRUNER_LABELS
from dualspeed.relative import RESAMPLES, Cell, resample_scores
from dualspeed.results import Results, read_results, write_frames
from dualspeed.row_runs import log_results
from dualspeed.summary import summarise, summary_columns, varied_settings
from dualspeed.table_format import (
    NOT_APPLICABLE,
    NOT_RUN,
    Table,
    format_mean,
    format_number,
    format_setting,
    write_table,
)

# Rel. of each line of the paper's ablation on LLaVA-1.5, as a public digest of it reports them.
PAPER_ABLATION = (95.89, 98.88, 99.32, 99.61)
ABLATION = ("NaivePrune", "+ fast and slow modes", "+ mode isolator", "+ self-distillation")
REL_NOTE = (
    "Rel.: mean over the benchmarks of the score relative to the Baseline of the same seed, in percent; in brackets "
    f"the 95 % interval of a paired bootstrap over questions ({RESAMPLES} draws); ±: standard deviation over seeds."
)


def write_tables(settings: dict[str, Any], out: Path, figures: Path, tracking: dict[str, str] | None = None) -> None:
    """Write the tidy csv files and the tables of a sheet under `out`, its figures under `figures`, and log all of it.

    Args:
        settings: {"sheet", "results" (folder), "benchmarks": names, "inference": {"pruner", "pruning_ratio"} (what a
            Baseline's pruned inference uses), "experiments": [{"id", "model", "method", "seed", "tables", "dualspeed":
            DualSpeedConfig's fields, "inferences", "speed_key", "pretrain_key", "settings_hash"}]}.
        tracking: {"uri", "experiment"} of the MLflow store; None logs nothing.

    Raises:
        ValueError: a file of the results tree is broken, or was scored on other questions than the rest.
    """
    out, figures = Path(out), Path(figures)
    results = read_results(settings)
    scores = resample_scores(results.statistics)
    write_frames(results, out)
    for make_table in (table1, table2, table3):
        write_table(make_table(settings, results, scores), out)
    write_figures(settings, results, scores, figures)
    if tracking:
        log_results(settings, results, scores, tracking, out, figures)


def table1(settings: dict[str, Any], results: Results, scores: dict[Cell, np.ndarray]) -> Table:
    """Methods x pruners x benchmarks on full tokens, with speed and cost."""
    rows = summarise(settings, results, scores, "table1")
    rows = rows[rows["inference"] == "full"]
    unit, seconds = time_unit(rows["train_hours"] * 3600)
    cells = setting_cells(rows) | {"Seeds": rows["num_seeds"].map(str)} | score_cells(rows, settings["benchmarks"])
    cells |= {
        "Speedup": [format_number(value, 2, "x") for value in rows["speedup_measured"]],
        "Limit": [format_number(value, 2, "x") for value in rows["speedup_theory"]],
        f"Train ({unit})": [format_number(3600 * value / seconds) for value in rows["train_hours"]],
        "In pruner": [
            NOT_APPLICABLE if row.method == "baseline" else format_number(100 * row.pruner_share, 1, " %")
            for row in rows.itertuples()
        ],
    }
    notes = (
        REL_NOTE,
        "Speedup: measured time of a step, Baseline over method. Limit: the same in FLOPs. Train: pretraining and "
        "finetuning, wall clock. In pruner: share of a fast step.",
        "The paper's own figures at p = 0.9: 2.1x on LLaVA-1.5 and 4.0x on LLaVA-NeXT (abstract); Rel. with DivPrune "
        "99.61 and 99.04 (second-hand, medium certainty).",
    )
    return Table("table1", "Table 1. Full-token inference after each way of training", rows, pd.DataFrame(cells), notes)


def table2(settings: dict[str, Any], results: Results, scores: dict[Cell, np.ndarray]) -> Table:
    """Full against pruned inference of the same models."""
    rows = summarise(settings, results, scores, "table2")
    cells = setting_cells(rows) | {"Inference": rows["inference"].map({"full": "full tokens", "pruned": "pruned"})}
    cells |= {"Seeds": rows["num_seeds"].map(str)} | score_cells(rows, settings["benchmarks"])
    chosen = settings["inference"]
    baseline = f"{PRUNER_LABELS.get(chosen['pruner'], chosen['pruner'])} at p = {chosen['pruning_ratio']:g}"
    notes = (
        f"Pruned inference uses the pruner and p of training; the Baseline's uses {baseline}.",
        REL_NOTE.replace("the Baseline of", "full-token inference of the Baseline of"),
    )
    title = "Table 2. Training-inference mismatch: the same models on full and on pruned tokens"
    return Table("table2", title, rows, pd.DataFrame(cells), notes)


def table3(settings: dict[str, Any], results: Results, scores: dict[Cell, np.ndarray]) -> Table:
    """What fast and slow modes, the isolator and distillation add to NaivePrune, one after another."""
    rows = summarise(keep_common_seeds(settings), results, scores, "table3")
    rows = ablation_rows(rows[rows["inference"] == "full"], list(settings["benchmarks"]))
    gain = [
        "" if row.step == 0 else format_gain(row.rel, rows["rel"][rows["step"] == row.step - 1])
        for row in rows.itertuples()
    ]
    cells = {"Training": [ABLATION[step] for step in rows["step"]]} | setting_cells(rows, leave_out=["Method"])
    cells |= {"Seeds": rows["num_seeds"].map(str)} | score_cells(rows, settings["benchmarks"])
    cells |= {"Change": gain, "Rel. % (paper's)": [f"{PAPER_ABLATION[step]:.2f}" for step in rows["step"]]}
    notes = (
        REL_NOTE,
        "Change: in Rel., from the line above. Of the seeds, those that every line has. The last column is the paper's "
        "ablation on LLaVA-1.5, second-hand and of medium certainty: another model, on other benchmarks.",
    )
    rows = rows.assign(rel_paper_second_hand=[PAPER_ABLATION[step] for step in rows["step"]])
    return Table("table3", "Table 3. Ablation: what each part of DualSpeed adds", rows, pd.DataFrame(cells), notes)


def ablation_step(method: str, num_virtual_tokens: int, distillation_weight: float) -> int | None:
    """Line of ABLATION that these settings are, None if they are none of them."""
    if method != "dualspeed":
        return 0 if method == "naive_prune" else None
    parts = (num_virtual_tokens > 0, distillation_weight > 0)
    return {(False, False): 1, (True, False): 2, (True, True): 3}.get(parts)


def keep_common_seeds(settings: dict[str, Any]) -> dict[str, Any]:
    """`settings` with Table 3 cut down to the seeds that all of its lines have: a seed can matter more than a part."""
    steps = {}
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
    for step in range(len(ABLATION)):
        found = [
            row | {"step": step}
            for row in rows.to_dict("records")
            if ablation_step(row["method"], row["num_virtual_tokens"], row["distillation_weight"]) == step
        ]
        parts += found or [{"num_seeds": 0, "step": step}]
    return pd.DataFrame(parts, columns=[*summary_columns(benchmarks), "step"])


def format_gain(rel: float, before: pd.Series) -> str:
    """Change of Rel. against the step before, where both are known and the step before is one row."""
    known = len(before) == 1 and not pd.isna(rel) and not before.isna().any()
    return f"{rel - before.iloc[0]:+.2f}" if known else NOT_RUN


def setting_cells(rows: pd.DataFrame, leave_out: list[str] | None = None) -> dict[str, list[str]]:
    """Columns that say what was trained; model, r, l and alpha only where they vary."""
    cells = {"Model": rows["model"].map(format_setting)} if rows["model"].nunique() > 1 else {}
    cells["Method"] = rows["method"].map(METHOD_LABELS).map(format_setting)
    cells["Pruner"] = rows["pruner"].map(lambda name: format_setting(PRUNER_LABELS.get(name, name)))
    cells["p"] = rows["pruning_ratio"].map(format_setting)
    cells |= {symbol: rows[column].map(format_setting) for symbol, column in varied_settings(rows).items()}
    return {label: list(column) for label, column in cells.items() if label not in (leave_out or [])}


def score_cells(rows: pd.DataFrame, benchmarks: list[str]) -> dict[str, list[str]]:
    """Columns of scores, their mean and Rel. with its interval."""
    labels = {name: BENCHMARK_LABELS.get(name, name) for name in benchmarks} | {"mean": "Mean"}
    cells = {
        label: [format_mean(mean, std) for mean, std in zip(rows[name], rows[f"{name}_std"], strict=True)]
        for name, label in labels.items()
    }
    return cells | {"Rel. %": [format_relative(row) for row in rows.itertuples()]}


def format_relative(row: Any) -> str:
    """Rel. of a summary's row with its interval; the Baseline's is 100 by definition and has none."""
    if pd.isna(row.rel) or (row.method, row.inference) == ("baseline", "full"):
        return format_number(row.rel)
    return f"{format_mean(row.rel, row.rel_std)} [{row.rel_low:.1f}, {row.rel_high:.1f}]"


def time_unit(seconds: pd.Series) -> tuple[str, float]:
    """Hours if anything takes one, else minutes, with the unit's seconds."""
    return ("h", 3600.0) if seconds.max() >= 3600 else ("min", 60.0)
