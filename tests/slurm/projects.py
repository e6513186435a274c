"""The demo's workflow, shrunk to minutes, and how the tests run it and look into it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
NAIVE, DUALSPEED = ROWS = ("naive_prune-divprune-p0.9-seed0", "dualspeed-divprune-p0.9-seed0")
NUM_STEPS = 400
# Without an accounting database the plugin has to ask squeue; and tests don't wait half a minute to look.
OPTIONS = ["--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "1"]
OPTIONS += ["--seconds-between-status-checks", "1", "--latency-wait", "10", "--slurm-no-account"]


def make_project(folder: Path, resources: dict | None = None) -> Path:
    """The demo with two rows and one benchmark, few pictures and few steps; finetuning takes less than a minute."""
    for name in ("config", "workflow", "profiles"):
        shutil.copytree(REPOSITORY / name, folder / name)
    for name in ("Snakefile", "Makefile"):
        shutil.copy(REPOSITORY / name, folder)
    file = folder / "config/demo/config.yaml"
    config = yaml.safe_load(file.read_text())
    config["data"] |= {"num_train_scenes": 120, "num_eval_scenes": 10, "questions_per_benchmark": 24}
    config["base_model"] |= {"vision_steps": 3, "excerpt_steps": 3, "caption_steps": 3, "num_scenes": 60}
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
    columns = header.split("\t")
    kept = [dict(zip(columns, row.split("\t"), strict=False)) for row in rows if row.split("\t")[0] in ROWS]
    for row in kept:
        # Half of the steps on all tokens: slow enough to be interrupted.
        row |= {"tables": "table1"} | ({"slow_mode_ratio": "0.5"} if row["id"] == DUALSPEED else {})
    lines = [header, *("\t".join(row.get(column, "") for column in columns) for row in kept)]
    sheet.write_text("\n".join(lines) + "\n")
    return folder


def snakemake(project: Path, *arguments: str, timeout: float = 600) -> str:
    """Output of a snakemake call."""
    done = subprocess.run([BIN / "snakemake", *arguments], cwd=project, capture_output=True, text=True, timeout=timeout)
    return done.stdout + done.stderr


def state_of(project: Path, row: str) -> Path | None:
    """State folder of a row's finetuning, once there is one."""
    for file in project.glob("results/state/*/run_spec.json"):
        if json.loads(file.read_text())["name"] == f"finetune {row}":
            return file.parent
    return None


def steps_of(project: Path, row: str) -> list[int]:
    """Steps that a row's finetuning has logged a loss for, as they stand in its file."""
    state = state_of(project, row)
    file = state / "metrics.jsonl" if state else None
    if file is None or not file.exists():
        return []
    lines = file.read_text().rpartition("\n")[0].splitlines()
    return [entry["step"] for entry in map(json.loads, lines) if "loss" in entry["metrics"]]


def live_trainer(project: Path, row: str) -> int | None:
    """Process that trains a row now, by its lock."""
    state = state_of(project, row)
    file = state / "lock" if state else None
    words = file.read_text().split() if file and file.exists() else []
    if len(words) < 2 or not Path(f"/proc/{words[1]}").exists():
        return None
    return int(words[1])


def environment() -> dict[str, str]:
    """Of commands that `make` starts."""
    return os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
