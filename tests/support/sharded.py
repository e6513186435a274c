"""Trainings by `dualspeed train` in two CPU processes that really shard, and what they leave."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dualspeed.settings.jobs import write_settings
from dualspeed.settings.recipe import LoraRecipe
from dualspeed.settings.stage import StageSettings
from tests.support.paths import REPOSITORY
from tests.support.stage import stage_settings

FORCING = REPOSITORY / "tests/support/sharding"
"""Folder whose sitecustomize.py makes accelerate shard on CPUs."""
STRATEGIES = ("fsdp2", "zero2", "zero3")
NUM_STEPS = 6
MAX_GRAD_NORM = 0.5


def require_deepspeed() -> None:
    """Skip a test where DeepSpeed is not installed; not in CI (.ci/run), which installs it."""
    if importlib.util.find_spec("deepspeed") is None and os.environ.get("DEEPSPEED_IS_INSTALLED") != "1":
        pytest.skip("needs `pip install --no-build-isolation -c constraints.txt deepspeed` and a C++ compiler")


def forced(environment: dict[str, str], **variables: str) -> dict[str, str]:
    """Environment of processes that shard on CPUs."""
    paths = os.pathsep.join(filter(None, (str(FORCING), environment.get("PYTHONPATH"))))
    return environment | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"} | variables


def sharded_settings(with_lora: bool) -> StageSettings:
    """Settings of NUM_STEPS steps in bfloat16: both modes, two micro-batches a step, clipping, validation."""
    chosen = stage_settings()
    chosen.recipe.training_arguments.update(
        bf16=True, max_steps=NUM_STEPS, activation_checkpointing=True, max_grad_norm=MAX_GRAD_NORM
    )
    recipe = dataclasses.replace(
        chosen.recipe,
        per_device_batch_size=1,
        validation_annotations="held-out.json",
        validation_steps=NUM_STEPS // 2,
        lora=LoraRecipe(rank=8, alpha=16) if with_lora else None,
    )
    return dataclasses.replace(chosen, recipe=recipe)


def command_of(
    inputs: Path, folder: Path, chosen: StageSettings, strategy: str | None, processes: int = 2
) -> list[str]:
    """`dualspeed train` by the file that ships for a strategy; `inputs` has base and data, `folder` gets the rest."""
    settings = write_settings(chosen, folder / "settings")
    command = [sys.executable, "-m", "dualspeed.cli", "train", "--settings", str(settings)]
    command += ["--model", str(inputs / "base"), "--data", str(inputs / "data")]
    command += ["--state", str(folder / "state"), "--out", str(folder / "out"), "--processes", str(processes)]
    return command if strategy is None else [*command, "--accelerate-config", f"config/accelerate/{strategy}.yaml"]


def run(command: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a training to its end; its processes write how they are sharded to `folder`/witness."""
    environment = forced(dict(os.environ), SHARDING_WITNESS=str(folder / "witness"), **variables)
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=900)


def kill_after_a_checkpoint(command: list[str], folder: Path) -> None:
    """Start a training and `kill -9` all its processes once it has written a checkpoint."""
    environment = forced(dict(os.environ), SHARDING_WITNESS=str(folder / "witness"))
    with open(folder / "killed.log", "w") as log:
        process = psutil.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 900
        while not checkpoints(folder):
            assert time.monotonic() < deadline and process.poll() is None, (folder / "killed.log").read_text()[-4000:]
            time.sleep(0.005)
        family = [*process.children(recursive=True), process]
        for member in family:
            member.kill()
        psutil.wait_procs(family, timeout=60)
    assert checkpoints(folder) and not (folder / "out").exists()


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that a training has left."""
    return list(folder.glob("state/*/checkpoints/checkpoint-*"))


def assert_sharded(folder: Path, strategy: str) -> None:
    """Both processes shared the model by this strategy, not each held all of it, and they left each other."""
    witnesses = [json.loads(path.read_text()) for path in sorted((folder / "witness").glob("rank*"))]
    assert len(witnesses) == 2
    for found in witnesses:
        assert found["num_processes"] == 2
        assert found["distributed_type"] == ("FSDP" if strategy == "fsdp2" else "DEEPSPEED")
        assert found["zero_stage"] == (None if strategy == "fsdp2" else int(strategy[-1]))
        assert found["num_dtensors"] == (found["num_parameters"] if strategy == "fsdp2" else 0)
        assert found["num_partitioned"] == (found["num_parameters"] if strategy == "zero3" else 0)
    ends = [json.loads(path.read_text()) for path in (folder / "witness").glob("ended*")]
    assert ends == [{"has_left": True}] * 2


def logged(folder: Path, name: str) -> list[float]:
    """Values of a metric in a trained model's log, in the order of the steps."""
    lines = [json.loads(line)["metrics"] for line in (folder / "metrics.jsonl").open()]
    return [metrics[name] for metrics in lines if name in metrics]
