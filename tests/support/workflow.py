"""Real dry runs and runs of the workflow in copies of the project, and edits of their configuration."""

import csv
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

from tests.support.paths import REPOSITORY

BASELINE, NAIVE, MILD, STRONG = ROWS = (
    "baseline-seed0",
    "naive_prune-divprune-p0.9-seed0",
    "dualspeed-divprune-p0.75-seed0",
    "dualspeed-divprune-p0.9-seed0",
)
TABLES = {
    "Write tables and figures of the sheet demo",
    "Write the page that shows the sheet demo: results/report.html",
}
KEPT = {"Draw which tokens each pruning method keeps"}
Edit = Callable[[Path], object]


def snakemake(project: Path, *arguments: str, package: Path | None = None) -> str:
    """Output of a Snakemake call in a project's folder, on the `dualspeed` of the folder `package` instead of ours."""
    command = [sys.executable, "-m", "snakemake", *arguments]
    environment = os.environ | ({"PYTHONPATH": str(package)} if package else {})
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=600)
    return done.stdout + done.stderr


def plan(project: Path, *arguments: str, package: Path | None = None) -> set[str]:
    """Messages of the jobs that a dry run would start, with hashes as *."""
    output = snakemake(project, "-n", *arguments, package=package)
    assert "This was a dry-run" in output or "Nothing to be done" in output, output[-3000:]
    jobs = re.findall(r"^Job \d+: (.*?)(?: \(progress: .*\))?$", output, flags=re.MULTILINE)
    return {re.sub(r"-[0-9a-f]{8}\b", "-*", job) for job in jobs if not job.startswith("All of the sheet")}


def edit_config(change: Callable[[dict], object], name: str = "demo") -> Edit:
    """An edit of config/<name>/config.yaml."""

    def edit(project: Path) -> None:
        file = project / f"config/{name}/config.yaml"
        content = yaml.safe_load(file.read_text())
        change(content)
        file.write_text(yaml.safe_dump(content, sort_keys=False))

    return edit


def edit_rows(change: Callable[[dict[str, dict]], object], sheet: str = "experiments", name: str = "demo") -> Edit:
    """An edit of the sheet's rows, by id; written to `sheet`, without comments."""

    def edit(project: Path) -> None:
        with (project / f"config/{name}/experiments.tsv").open(newline="") as file:
            lines = [line for line in file if not line.startswith("#")]
            rows = {row["id"]: row for row in csv.DictReader(lines, delimiter="\t")}
        change(rows)
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        with (project / f"config/{name}/{sheet}.tsv").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, delimiter="\t")
            writer.writeheader()
            writer.writerows(rows.values())

    return edit


def edit_cell(column: str, value: object, row: str = MILD) -> Edit:
    """An edit of one cell."""
    return edit_rows(lambda rows: rows[row].update({column: value}))


def touch_everything(project: Path) -> None:
    """An edit that changes no content."""
    for file in project.rglob("results/**/*.json*"):
        file.touch()


def edit_code(project: Path) -> None:
    """An edit of a rule's command."""
    rules = project / "workflow/rules/train.smk"
    rules.write_text(rules.read_text().replace("exec dualspeed train", "exec dualspeed  train"))


def finetune_recipe(content: dict) -> dict:
    return content["models"]["tiny"]["stages"]["finetune"]


TARGETS = [f"results/models/{MILD}", f"results/scores/{MILD}/full/gqa.json"]


def shrunk_project(folder: Path) -> Path:
    """The demo's workflow with one row, few pictures and few steps."""
    for name in ("config", "workflow", "profiles"):
        shutil.copytree(REPOSITORY / name, folder / name)
    shutil.copy(REPOSITORY / "Snakefile", folder)
    file = folder / "config/demo/config.yaml"
    config = yaml.safe_load(file.read_text())
    config["data"] |= {"num_train_scenes": 120, "num_eval_scenes": 10, "questions_per_benchmark": 24}
    config["base_model"] |= {"vision_steps": 3, "caption_steps": 3, "question_steps": 3, "num_scenes": 60}
    for stage in config["models"]["tiny"]["stages"].values():
        stage["training_arguments"] |= {"max_steps": 4, "warmup_steps": 1, "logging_steps": 1}
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    edit_rows(lambda rows: [rows.pop(row) for row in list(rows) if row != MILD])(folder)
    return folder


def copy_project(folder: Path) -> Path:
    """The repository's workflow with its configurations, in a folder of its own."""
    for name in ("Snakefile", "workflow", "profiles", "config"):
        source = REPOSITORY / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    return folder


FOLDERS = ("make_demo_data", "make_base_model", "link_base_model", "prepare_data", "pretrain", "finetune")
"""Rules whose output is a folder."""


def write_stubs(project: Path, *arguments: str) -> None:
    """Write a stand-in for every output of the workflow."""
    for line in snakemake(project, "--summary", *arguments).splitlines():
        path, *columns = line.split("\t")
        if len(columns) == 5 and path.startswith("results/"):
            output = project / path
            output.parent.mkdir(parents=True, exist_ok=True)
            if columns[1] in FOLDERS:
                output.mkdir()
            else:
                output.write_text(path)


def stub_outputs(project: Path, *arguments: str) -> None:
    """Let Snakemake take every job for done: its outputs are stand-ins, its records are real."""
    write_stubs(project, *arguments)
    snakemake(project, "--touch", "--forceall", *arguments)
