"""The paper's tables, filled with what a sheet's experiments have given so far.

Table 1: methods and pruners on all benchmarks, with Rel., speed and cost. Table 2: the same models on full tokens and
on pruned ones, where training and inference do not match. Table 3: what each part of DualSpeed adds. One more says
where the time goes. A cell whose job has not run says so, and is empty in the csv.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dualspeed.evaluation.bootstrap import RESAMPLES, Cell, resample_scores
from dualspeed.reporting import paper
from dualspeed.reporting.ablation import STEPS, ablation_rows, gains, keep_common_seeds
from dualspeed.reporting.figures.figures import write_figures
from dualspeed.reporting.frames import Results, read_results, write_frames
from dualspeed.reporting.mlflow_runs import log_results
from dualspeed.reporting.summary import SETTINGS, is_reference, summarise, summarise_all
from dualspeed.reporting.table_cells import (
    add_headlines,
    best_scores,
    paper_cells,
    pruning_cells,
    score_cells,
    setting_cells,
    time_unit,
)
from dualspeed.reporting.table_format import NOT_APPLICABLE, NOT_RUN, Table, format_number, write_table
from dualspeed.settings.names import PRUNER_LABELS, in_paper_order

MME_NOTE = "MME: points of perception, as papers report it (at most 200 a category); Mean and Rel. take its accuracy."
REL_NOTE = (
    "Rel.: mean over the benchmarks of the score relative to the Baseline of the same seed, in percent; in brackets "
    f"the 95 % interval of a paired bootstrap over questions ({RESAMPLES} draws); ±: standard deviation over seeds."
)
PAPER_SUMMARY = (
    "The paper's own figures at p = 0.9: 2.1x on LLaVA-1.5 and 4.0x on LLaVA-NeXT (abstract); Rel. with DivPrune "
    "99.61 and 99.04 (second-hand, medium certainty)."
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
    for table in make_tables(settings, results, scores):
        write_table(table, out)
    write_figures(settings, results, scores, figures)
    if tracking:
        log_results(settings, results, scores, tracking, out, figures)


def make_tables(settings: dict[str, Any], results: Results, scores: dict[Cell, np.ndarray]) -> list[Table]:
    """All tables of a sheet, columns in the paper's order; `scores` come from `resample_scores`."""
    settings = settings | {"benchmarks": in_paper_order(settings["benchmarks"])}
    return [make_table(settings, results, scores) for make_table in (table1, table2, table3, table_speed)]


def table1(settings: dict[str, Any], results: Results, scores: dict[Cell, np.ndarray]) -> Table:
    """Methods x pruners x benchmarks on full tokens, with speed and cost."""
    rows = summarise(settings, results, scores, "table1")
    rows, headlines = add_headlines(rows[rows["inference"] == "full"].reset_index(drop=True), results.headlines)
    rows = paper.add_paper_values(rows)
    unit, seconds = time_unit(rows["train_hours"] * 3600)
    cells = setting_cells(rows) | {"Seeds": rows["num_seeds"].map(str)}
    cells |= score_cells(rows, settings["benchmarks"], headlines)
    cells |= paper_cells(rows, "rel", "Rel. % (paper)")
    cells |= {"Speedup": [format_number(value, 2, "x") for value in rows["speedup_measured"]]}
    cells |= paper_cells(rows, "speedup", "Speedup (paper)")
    cells |= {
        "Limit": [format_number(value, 2, "x") for value in rows["speedup_theory"]],
        f"Train ({unit})": [format_number(3600 * value / seconds) for value in rows["train_hours"]],
        "In pruner": pruning_cells(rows, "pruner_share", 100, 1, " %"),
    }
    grey = tuple(column for column in cells if column.endswith("(paper)"))
    notes = (
        REL_NOTE,
        "Speedup: measured time of a step, Baseline over method. Limit: the same in FLOPs. Train: pretraining and "
        "finetuning, wall clock. In pruner: share of a fast step.",
        paper.NOTE if grey else PAPER_SUMMARY,
        *([MME_NOTE] if "mme" in headlines else []),
    )
    best = best_scores(rows, settings["benchmarks"], lambda row: None if is_reference(row) else row["model"], headlines)
    title = "Table 1. Full-token inference after each way of training"
    return Table("table1", title, rows, pd.DataFrame(cells), notes, best, grey)


def table2(settings: dict[str, Any], results: Results, scores: dict[Cell, np.ndarray]) -> Table:
    """Full against pruned inference of the same models."""
    rows = summarise(settings, results, scores, "table2")
    cells = setting_cells(rows) | {"Inference": rows["inference"].map({"full": "full tokens", "pruned": "pruned"})}
    cells |= {"Seeds": rows["num_seeds"].map(str)} | score_cells(rows, settings["benchmarks"])
    chosen = settings["inference"]
    baseline = f"{PRUNER_LABELS.get(chosen['pruner'], chosen['pruner'])} at p = {chosen['pruning_ratio']:g}"
    notes: tuple[str, ...] = (
        f"Pruned inference uses the pruner and p of training; the Baseline's uses {baseline}.",
        REL_NOTE.replace("the Baseline of", "full-token inference of the Baseline of"),
    )
    if rows["model"].isin(paper.FAMILIES).any():
        notes += (paper.MISMATCH_NOTE,)
    # Every model against itself: what it answers better on.
    settings_of_model = ["model", "method", *SETTINGS]
    best = best_scores(rows, settings["benchmarks"], lambda row: tuple(row[settings_of_model].map(str)))
    title = "Table 2. Training-inference mismatch: the same models on full and on pruned tokens"
    return Table("table2", title, rows, pd.DataFrame(cells), notes, best)


def table3(settings: dict[str, Any], results: Results, scores: dict[Cell, np.ndarray]) -> Table:
    """What fast and slow modes, the isolator and distillation add to NaivePrune, one after another."""
    rows = summarise(keep_common_seeds(settings), results, scores, "table3")
    rows = ablation_rows(rows[rows["inference"] == "full"], list(settings["benchmarks"]))
    cells = {"Training": [STEPS[step] for step in rows["step"]]} | setting_cells(rows, leave_out=["Method"])
    cells |= {"Seeds": rows["num_seeds"].map(str)} | score_cells(rows, settings["benchmarks"])
    cells |= {
        "Change": ["" if gain is None else NOT_RUN if pd.isna(gain) else f"{gain:+.2f}" for gain in gains(rows)],
        "Rel. % (paper)": [str(paper.ABLATION[step]) for step in rows["step"]],
    }
    notes = (
        REL_NOTE,
        "Change: in Rel., from the line above. Of the seeds, those that every line has. The last column is the paper's "
        "ablation on LLaVA-1.5, second-hand and of medium certainty; anywhere else it is another model, on other "
        "benchmarks.",
    )
    rows = rows.assign(
        rel_paper=[paper.ABLATION[step].value for step in rows["step"]],
        rel_paper_certainty=[paper.ABLATION[step].certainty for step in rows["step"]],
    )
    best = best_scores(rows, settings["benchmarks"], lambda row: row["model"])
    title = "Table 3. Ablation: what each part of DualSpeed adds"
    return Table("table3", title, rows, pd.DataFrame(cells), notes, best, ("Rel. % (paper)",))


def table_speed(settings: dict[str, Any], results: Results, scores: dict[Cell, np.ndarray]) -> Table:
    """Where the time goes: seconds of a step, speedup against its limit, stages, memory, GPU hours; of every row."""
    rows = summarise_all(settings, results, scores)
    rows = rows[rows["inference"] == "full"].reset_index(drop=True)
    rows = rows.assign(share_of_limit=rows["speedup_measured"] / rows["speedup_theory"])
    unit, seconds = time_unit(rows["train_hours"] * 3600)
    cells = setting_cells(rows) | {
        "Fast step (s)": pruning_cells(rows, "fast_step_seconds"),
        "Slow step (s)": pruning_cells(rows, "slow_step_seconds", never="naive_prune"),
        "Baseline step (s)": pruning_cells(rows, "baseline_step_seconds"),
        "u": pruning_cells(rows, "fast_flops_share"),
        "Speedup": [format_number(value, 2, "x") for value in rows["speedup_measured"]],
        "Limit": [format_number(value, 2, "x") for value in rows["speedup_theory"]],
        "Of limit": pruning_cells(rows, "share_of_limit", 100, 0, " %"),
        "In pruner": pruning_cells(rows, "pruner_share", 100, 1, " %"),
        f"Pretrain ({unit})": [format_number(value / seconds) for value in rows["pretrain_seconds"]],
        f"Finetune ({unit})": [format_number(value / seconds) for value in rows["finetune_seconds"]],
        "Samples/s": [format_number(value) for value in rows["samples_per_second"]],
        "Memory (GB)": [format_number(value / 1e9) for value in rows["peak_memory_bytes"]],
        "GPU hours": [NOT_APPLICABLE if pd.isna(value) else f"{value:.1f}" for value in rows["gpu_hours"]],
    }
    notes = (
        "Steps: median seconds on one batch in memory, each mode in turn, Baseline's too. "
        "u: FLOPs of a fast step over a Baseline's. Limit: 1 / ((1 - r) u + r (1 + u/3)), u/3 only where a teacher "
        "runs. Of limit: measured speedup over it.",
        "Stages: wall clock with loading, over all resumes, beside whatever else the machine did; samples per second "
        "and peak memory of the finetuning.",
    )
    title = "Speed and cost of each way of training"
    return Table("table_speed", title, rows, pd.DataFrame(cells), notes)
