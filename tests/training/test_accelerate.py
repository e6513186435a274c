"""Configurations for `accelerate launch` that ship: accelerate reads each, and two processes train with it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText

from dualspeed.settings.jobs import write_settings
from tests.support import tiny
from tests.support.paths import REPOSITORY
from tests.support.stage import stage_settings

FOLDER = REPOSITORY / "config/accelerate"


@pytest.mark.parametrize("name, kind", [("fsdp2", "FSDP"), ("zero2", "DEEPSPEED"), ("zero3", "DEEPSPEED")])
def test_every_file_is_one_that_accelerate_takes(name, kind):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.distributed_type == kind
    if kind == "DEEPSPEED":
        file = REPOSITORY / config.deepspeed_config["deepspeed_config_file"]
        assert json.loads(file.read_text())["zero_optimization"]["stage"] == int(name[-1])
    else:
        assert config.fsdp_config["fsdp_version"] == 2


def train(stage_inputs: Path, model: Path, out: Path, *launcher: str) -> Path:
    """Train six steps by the command line; folder of the trained model."""
    chosen = stage_settings()
    chosen.recipe.training_arguments.update(bf16=True, max_steps=6, activation_checkpointing=True)
    settings = write_settings(chosen, out / "settings")
    command = [sys.executable, "-m", "dualspeed.cli", "train", "--settings", str(settings), "--model", str(model)]
    command += ["--data", str(stage_inputs / "data"), "--state", str(out / "state"), "--out", str(out / "model")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*command, *launcher], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out / "model"


@pytest.fixture(scope="module")
def single(stage_inputs, tmp_path_factory) -> tuple[Path, Path]:
    """Base model in bfloat16, and the model that one process trains from it."""
    folder = tmp_path_factory.mktemp("single")
    tiny.make_llava(folder / "float32")
    model = AutoModelForImageTextToText.from_pretrained(folder / "float32", dtype=torch.bfloat16)
    model.save_pretrained(folder / "base")
    tiny.llava_processor().save_pretrained(folder / "base")
    return folder / "base", train(stage_inputs, folder / "base", folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp2", "zero2", "zero3"])
def test_two_processes_train_by_the_shipped_file_as_one_does(stage_inputs, single, tmp_path, name):
    if name != "fsdp2":
        pytest.importorskip("deepspeed", reason="needs `pip install deepspeed`")
    base, alone = single
    together = train(
        stage_inputs, base, tmp_path, "--processes", "2", "--accelerate-config", f"config/accelerate/{name}.yaml"
    )
    before, after, expected = (load_file(folder / "model.safetensors") for folder in (base, together, alone))
    assert after.keys() == before.keys()
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    moved = {key for key in before if not after[key].equal(before[key])}
    assert any("language_model" in key for key in moved) and not any("vision_tower" in key for key in moved)
    for key in moved:
        change, wanted = (weights[key].float() - before[key].float() for weights in (after, expected))
        assert torch.nn.functional.cosine_similarity(change.flatten(), wanted.flatten(), dim=0) > 0.5, key
    assert_close(after, expected, atol=0.02, rtol=0.05)
    AutoModelForImageTextToText.from_pretrained(together)
