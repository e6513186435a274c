"""The paper's tables, filled with a sheet's results so far.

Table 1: methods and pruners on all benchmarks, with Rel., speed and cost. Table 2: the same models on full tokens and
on pruned ones, the mismatch of training and inference. Table 3: the ablation of DualSpeed's parts. One more shows step
times, speedup and cost. The cell of a missing result says so in the text formats and is empty in the csv.
"""

from dataclasses import replace
from pathlib import Path

import pandas as pd

from dualspeed.evaluation.bootstrap import RESAMPLES
from dualspeed.reporting import paper
from dualspeed.reporting.ablation import STEPS, ablation_rows, gain_intervals, gains, keep_common_seeds, significance
from dualspeed.reporting.frames import Results, read_results, write_frames
from dualspeed.reporting.summary import SETTINGS, is_baseline, summarise, summarise_table
from dualspeed.reporting.table_cells import (
    add_headlines,
    best_scores,
    paper_cells,
    pruning_cells,
    score_cells,
    setting_cells,
    time_unit,
)
from dualspeed.reporting.table_format import NO_RATIO, NOT_APPLICABLE, Table, format_gain, format_number, write_table
from dualspeed.settings.names import PRUNER_LABELS
from dualspeed.settings.sheet import Sheet

MME_NOTE = "MME: points of perception, as papers report it (at most 200 a category); Mean and Rel. take its accuracy."
REL_NOTE = (
    "Rel.: mean over the benchmarks of the score relative to the Baseline of the same seed, in percent; in brackets "
    f"the 95 % interval of a paired bootstrap over questions ({RESAMPLES} draws); ±: standard deviation over seeds."
)
PAPER_SUMMARY = (
    "The paper's own figures at p = 0.9: 2.1x on LLaVA-1.5 and 4.0x on LLaVA-NeXT (abstract); Rel. with DivPrune "
    "99.61 and 99.04 (second-hand, medium certainty)."
)
NO_RATIO_NOTE = f"{NO_RATIO}: the Baseline scored 0 on a benchmark, so no share of its score can be told."


def write_tables(sheet: Sheet, out: Path) -> None:
    """Write the tidy csv files and the tables of a sheet under `out`.

    Raises:
        ResultsError: a result is broken, or its score is of other questions than the other rows' scores.
    """
    results = read_results(sheet)
    write_frames(results, Path(out))
    for table in make_tables(results):
        write_table(table, Path(out))


def make_tables(results: Results) -> list[Table]:
    """All tables of a sheet, columns in the paper's order."""
    tables = [make_table(results) for make_table in (table1, table2, table3, table_speed)]
    return [
        replace(table, notes=(*table.notes, NO_RATIO_NOTE)) if (table.cells == NO_RATIO).any(axis=None) else table
        for table in tables
    ]


def table1(results: Results) -> Table:
    """Table 1: methods x pruners x benchmarks on full tokens, with speed and cost."""
    rows = summarise_table(results, "table1")
    rows, headlines = add_headlines(rows[rows["inference"] == "full"].reset_index(drop=True), results.headlines)
    rows = paper.add_paper_values(rows)
    unit, seconds = time_unit(rows["train_hours"] * 3600)
    cells = setting_cells(rows) | {"Seeds": rows["num_seeds"].map(str)}
    cells |= score_cells(rows, results.benchmarks, headlines)
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
    best = best_scores(rows, results.benchmarks, lambda row: None if is_baseline(row) else row["model"], headlines)
    title = "Table 1. Full-token inference after each way of training"
    return Table("table1", title, rows, pd.DataFrame(cells), notes, best, grey)


def table2(results: Results) -> Table:
    """Table 2: the same models on full and on pruned tokens."""
    rows = summarise_table(results, "table2")
    cells = setting_cells(rows) | {"Inference": rows["inference"].map({"full": "full tokens", "pruned": "pruned"})}
    cells |= {"Seeds": rows["num_seeds"].map(str)} | score_cells(rows, results.benchmarks)
    pruned = results.sheet.inference
    baseline = f"{PRUNER_LABELS[pruned.pruner]} at p = {pruned.pruning_ratio:g}"
    notes: tuple[str, ...] = (
        f"Pruned inference uses the pruner and p of training; the Baseline's uses {baseline}.",
        REL_NOTE.replace("the Baseline of", "full-token inference of the Baseline of"),
    )
    if rows["model"].isin(paper.FAMILIES).any():
        notes += (paper.MISMATCH_NOTE,)
    # Full and pruned inference of the same model are compared.
    settings_of_model = ["model", "method", *SETTINGS]
    best = best_scores(rows, results.benchmarks, lambda row: tuple(row[settings_of_model].map(str)))
    title = "Table 2. Training-inference mismatch: the same models on full and on pruned tokens"
    return Table("table2", title, rows, pd.DataFrame(cells), notes, best)


def table3(results: Results) -> Table:
    """Table 3: NaivePrune, then fast and slow modes, the isolator and distillation added one after another."""
    shown = [row for row in results.sheet.rows if "table3" in row.tables]
    rows = summarise(results, keep_common_seeds(shown))
    rows = paper.add_ablation_values(ablation_rows(rows[rows["inference"] == "full"], results.benchmarks))
    cells = {"Training": [STEPS[step] for step in rows["step"]]} | setting_cells(rows, leave_out=["Method"])
    cells |= {"Seeds": rows["num_seeds"].map(str)} | score_cells(rows, results.benchmarks)
    intervals = gain_intervals(rows, results)
    cells |= {
        "Change": [format_gain(gain, interval) for gain, interval in zip(gains(rows), intervals, strict=True)],
    }
    cells |= paper_cells(rows, "rel", "Rel. % (paper)")
    notes = (
        REL_NOTE,
        "Change: in Rel., from the step before, with the 95 % interval of a paired bootstrap over questions and seeds. "
        f"{significance(rows, intervals)} Of the seeds, those that every step has. The last column is the paper's "
        "ablation on LLaVA-1.5, second-hand and of medium certainty; anywhere else it is another model, on other "
        "benchmarks.",
    )
    best = best_scores(rows, results.benchmarks, lambda row: row["model"])
    title = "Table 3. Ablation: what each part of DualSpeed adds"
    return Table("table3", title, rows, pd.DataFrame(cells), notes, best, ("Rel. % (paper)",))


def table_speed(results: Results) -> Table:
    """Step times, speedup and its limit, time of the stages, memory and GPU hours of every row."""
    rows = summarise(results, results.sheet.rows)
    rows = rows[rows["inference"] == "full"].reset_index(drop=True)
    rows = rows.assign(share_of_limit=rows["speedup_measured"] / rows["speedup_theory"])
    unit, seconds = time_unit(rows["train_hours"] * 3600)
    pretrained = {row.id for row in results.sheet.rows if row.pretrain_key}
    cells = setting_cells(rows) | {
        "Fast step (s)": pruning_cells(rows, "fast_step_seconds"),
        "Slow step (s)": pruning_cells(rows, "slow_step_seconds", never="naive_prune"),
        "Baseline step (s)": pruning_cells(rows, "baseline_step_seconds"),
        "u": pruning_cells(rows, "fast_flops_share"),
        "Speedup": [format_number(value, 2, "x") for value in rows["speedup_measured"]],
        "Limit": [format_number(value, 2, "x") for value in rows["speedup_theory"]],
        "Of limit": pruning_cells(rows, "share_of_limit", 100, 0, " %"),
        "In pruner": pruning_cells(rows, "pruner_share", 100, 1, " %"),
        f"Pretrain ({unit})": [
            format_number(value / seconds) if pretrained.intersection(ids) else NOT_APPLICABLE
            for value, ids in zip(rows["pretrain_seconds"], rows["experiments"], strict=True)
        ],
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
