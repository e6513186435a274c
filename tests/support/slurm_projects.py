"""The demo's workflow shrunk to minutes, with functions to edit it, run it and inspect its state."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

from dualspeed.layout import METRICS_FILE
from dualspeed.tracking.metrics_file import read_metrics
from tests.support.paths import REPOSITORY

BIN = Path(sys.executable).parent
MILD, STRONG = ROWS = ("dualspeed-divprune-p0.75-seed0", "dualspeed-divprune-p0.9-seed0")
NUM_STEPS = 300
# Without an accounting database the plugin must ask squeue. It first waits for half a minute by default.
OPTIONS = ["--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "1"]
OPTIONS += ["--seconds-between-status-checks", "1", "--latency-wait", "10", "--slurm-no-account"]


def make_project(folder: Path, resources: dict | None = None) -> Path:
    """Copy the demo with two rows, one benchmark, few pictures and few steps; finetuning takes half a minute."""
    for name in ("config", "workflow", "profiles"):
        shutil.copytree(REPOSITORY / name, folder / name)
    for name in ("Snakefile", "Makefile"):
        shutil.copy(REPOSITORY / name, folder)
    file = folder / "config/demo/config.yaml"
    config = yaml.safe_load(file.read_text())
    config["data"] |= {"num_train_scenes": 120, "num_eval_scenes": 10, "questions_per_benchmark": 24}
    config["base_model"] |= {"vision_steps": 3, "caption_steps": 3, "question_steps": 3, "num_scenes": 60}
    model = config["models"]["tiny"]
    model["resources"] = resources or {}
    shared = {"warmup_steps": 1, "logging_steps": 1, "save_steps": 20}
    model["stages"]["pretrain"]["training_arguments"] |= shared | {"max_steps": 4}
    model["stages"]["finetune"]["training_arguments"] |= shared | {"max_steps": NUM_STEPS}
    for stage in model["stages"].values():
        stage["global_batch_size"] = 4
    config["benchmarks"] = {"gqa": config["benchmarks"]["gqa"]}
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    sheet = folder / "config/demo/experiments.tsv"
    header, *rows = sheet.read_text().splitlines()
    sheet.write_text("\n".join([header, *(row for row in rows if row.partition("\t")[0] in ROWS)]) + "\n")
    for row in ROWS:
        # Half of the steps are on full tokens, so that training is slow enough to be interrupted.
        edit_row(folder, row, tables="table1", slow_mode_ratio="0.5")
    return folder


def edit_row(project: Path, row: str, **cells: str) -> None:
    """Change cells of the sheet."""
    sheet = project / "config/demo/experiments.tsv"
    header, *lines = sheet.read_text().splitlines()
    columns, edited = header.split("\t"), [header]
    for line in lines:
        values = dict(zip(columns, line.split("\t"), strict=True))
        edited.append("\t".join((values | (cells if values["id"] == row else {})).values()))
    sheet.write_text("\n".join(edited) + "\n")


def edit_config(project: Path, change: Callable[[dict], object]) -> None:
    """Change config.yaml."""
    file = project / "config/demo/config.yaml"
    config = yaml.safe_load(file.read_text())
    change(config)
    file.write_text(yaml.safe_dump(config, sort_keys=False))


def snakemake(project: Path, *arguments: str, timeout: float = 600) -> str:
    """Output of a snakemake call."""
    done = subprocess.run([BIN / "snakemake", *arguments], cwd=project, capture_output=True, text=True, timeout=timeout)
    return done.stdout + done.stderr


def state_of(project: Path, row: str) -> Path | None:
    """State folder of a row's finetuning; None before it starts."""
    for file in project.glob("results/state/*/run_spec.json"):
        if json.loads(file.read_text())["name"] == f"finetune {row}":
            return file.parent
    return None


def steps_of(project: Path, row: str) -> list[int]:
    """Steps that a row's finetuning has logged a loss for, in the order of its file."""
    state = state_of(project, row)
    return [line.step for line in read_metrics(state / METRICS_FILE) if "loss" in line.metrics] if state else []


def live_trainer(project: Path, row: str) -> int | None:
    """Id of the live process that holds the lock of a row's finetuning; None if there is none."""
    state = state_of(project, row)
    file = state / "lock" if state else None
    words = file.read_text().split() if file and file.exists() else []
    if len(words) < 2 or not Path(f"/proc/{words[1]}").exists():
        return None
    return int(words[1])
