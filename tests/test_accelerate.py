"""The launcher files that ship: each is read as accelerate and DeepSpeed read it, and FSDP2's trains two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from test_train import inputs, settings  # noqa: F401 (inputs is a fixture)
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText

REPOSITORY = Path(__file__).parents[1]
FOLDER = REPOSITORY / "config/accelerate"
FSDP2 = "config/accelerate/fsdp2.yaml"


@pytest.mark.parametrize("name, kind", [("fsdp2", "FSDP"), ("zero2", "DEEPSPEED"), ("zero3", "DEEPSPEED")])
def test_every_file_is_one_that_accelerate_takes(name, kind):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.distributed_type == kind
    if kind == "DEEPSPEED":
        file = REPOSITORY / config.deepspeed_config["deepspeed_config_file"]
        assert json.loads(file.read_text())["zero_optimization"]["stage"] == int(name[-1])
    else:
        assert config.fsdp_config["fsdp_version"] == 2


def train(inputs: Path, model: Path, out: Path, *launcher: str) -> Path:  # noqa: F811
    chosen = settings().to_dict()
    chosen["recipe"]["training_arguments"] |= {"bf16": True, "max_steps": 6, "activation_checkpointing": True}
    command = [sys.executable, "-m", "dualspeed.cli", "train", "--settings", json.dumps(chosen), "--model", str(model)]
    command += ["--data", str(inputs / "data"), "--state", str(out / "state"), "--out", str(out / "model"), *launcher]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return out / "model"


@pytest.mark.slow
def test_fsdp2_by_the_shipped_file_trains_two_processes_as_one(inputs, tmp_path):  # noqa: F811
    tiny.make_llava(tmp_path / "float32")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    tiny.llava_processor().save_pretrained(tmp_path / "base")
    single = train(inputs, tmp_path / "base", tmp_path / "single")
    sharded = train(inputs, tmp_path / "base", tmp_path / "two", "--processes", "2", "--accelerate-config", FSDP2)
    before, after, expected = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "base", sharded, single)
    )
    assert after.keys() == before.keys()
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    moved = {name for name in before if not after[name].equal(before[name])}
    assert any("language_model" in name for name in moved) and not any("vision_tower" in name for name in moved)
    for name in moved:
        change, wanted = (weights[name].float() - before[name].float() for weights in (after, expected))
        assert torch.nn.functional.cosine_similarity(change.flatten(), wanted.flatten(), dim=0) > 0.5, name
    assert_close(after, expected, atol=0.02, rtol=0.05)
    AutoModelForImageTextToText.from_pretrained(sharded)
