"""A sheet of 250 rows goes through Snakemake to its tables: no job's settings stand on a command line."""

import csv
import re
from pathlib import Path

import pytest

from dualspeed.layout import Layout
from dualspeed.settings.project import load_project
from tests.support.results_tree import write, write_score, write_training
from tests.support.workflow import copy_project, edit_config, snakemake, write_stubs

NUM_ROWS, NUM_SEEDS = 250, 5
LONGEST_COMMAND = 1000
"""Characters that the command may have, however many rows there are; Linux takes 128 KiB for one argument."""
SHEET = "config/demo/experiments-many.tsv"
CHOICE = ("--config", f"experiments={SHEET}")


def write_sheet(path: Path) -> None:
    """A Baseline of each seed, and DualSpeed at many pruning ratios."""
    rows = [(f"baseline-of-the-seed-{seed}", "baseline", "", seed) for seed in range(NUM_SEEDS)]
    ratios = range(1, 1 + (NUM_ROWS - NUM_SEEDS) // NUM_SEEDS)
    rows += [
        (f"dualspeed-p{ratio / 100:g}-seed{seed}", "dualspeed", ratio / 100, seed)
        for ratio in ratios
        for seed in range(NUM_SEEDS)
    ]
    lines = ["\t".join(("id", "model", "method", "pruning_ratio", "seed", "tables"))]
    lines += [f"{name}\ttiny\t{method}\t{ratio}\t{seed}\ttable1" for name, method, ratio, seed in rows]
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.slow
def test_a_sheet_of_250_rows_becomes_tables(tmp_path, monkeypatch):
    project = copy_project(tmp_path)
    write_sheet(project / SHEET)
    edit_config(lambda content: [content["benchmarks"].pop(name) for name in ("mme", "pope", "scienceqa")])(project)
    write_stubs(project, *CHOICE)
    monkeypatch.chdir(project)
    many, layout = load_project("config/demo/config.yaml", experiments=SHEET), Layout("results")
    assert len(many.rows) == NUM_ROWS
    for number, row in enumerate(many.rows):
        for benchmark in many.scored:
            write_score(layout, row.id, benchmark, 40 + number % 50)
        write_training(layout.model(row.id), 60.0, "slow" if row.method == "baseline" else "fast")
        write_training(layout.pretraining(row.pretrain_key), 30.0)
        if row.speed_key:
            times = {"baseline_step_seconds": 1.0, "fast_step_seconds": 0.25, "slow_step_seconds": 1.1}
            write(layout.speed(row.speed_key), times | {"theory_u": 0.2, "pruner_seconds": 0.005})
    snakemake(project, "--touch", "--forceall", *CHOICE)
    table = Path(layout.tables(many.sheet.name)) / "table1.csv"
    table.unlink()
    output = snakemake(project, "--cores", "2", "--printshellcmds", *CHOICE, "--", str(table))
    assert table.exists(), output[-3000:]
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1 + (NUM_ROWS - NUM_SEEDS) // NUM_SEEDS
    assert {row["num_seeds"] for row in rows} == {str(NUM_SEEDS)}
    (command,) = re.findall(r"dualspeed tables .*", output)
    assert len(command) < LONGEST_COMMAND
    assert "Finetune" not in output and "Pretrain" not in output
