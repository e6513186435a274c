"""Files for `accelerate launch`: the shipped ones are read by accelerate too, and bad ones are refused at the start."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from dualspeed.errors import CheckpointError, ConfigError, ShardingError, WorldSizeError
from dualspeed.settings.jobs import write_settings
from dualspeed.settings.recipe import LoraRecipe
from dualspeed.settings.sharding import check_fit, read_sharding
from dualspeed.settings.stage import StageSettings
from dualspeed.training.start import check_start
from dualspeed.training.state import open_state
from tests.support.paths import REPOSITORY
from tests.support.stage import stage_settings

FOLDER = REPOSITORY / "config/accelerate"
KINDS = [("fsdp2", "FSDP"), ("zero2", "DEEPSPEED"), ("zero3", "DEEPSPEED")]


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


def settings_of(**changes) -> StageSettings:
    """Settings in bfloat16, as the shipped files ask for, with these changes of the recipe."""
    chosen = stage_settings()
    chosen.recipe.training_arguments.update(bf16=True)
    arguments = chosen.recipe.training_arguments | changes.pop("training_arguments", {})
    return dataclasses.replace(
        chosen, recipe=dataclasses.replace(chosen.recipe, training_arguments=arguments, **changes)
    )


@pytest.mark.parametrize("name, kind", KINDS)
def test_every_file_is_one_that_accelerate_takes(name, kind):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.distributed_type == kind
    if kind == "DEEPSPEED":
        file = REPOSITORY / config.deepspeed_config["deepspeed_config_file"]
        assert json.loads(file.read_text())["zero_optimization"]["stage"] == int(name[-1])
    else:
        assert config.fsdp_config["fsdp_version"] == 2
    assert read_sharding(f"config/accelerate/{name}.yaml").name == name


def edited(tmp_path: Path, name: str, change) -> str:
    """Copy of a shipped file, with DeepSpeed's settings beside it, after `change(launcher, deepspeed)`."""
    launcher, deepspeed = yaml.safe_load((FOLDER / f"{name}.yaml").read_text()), {}
    if "deepspeed_config" in launcher:
        deepspeed = json.loads((FOLDER / f"{name}.json").read_text())
        launcher["deepspeed_config"]["deepspeed_config_file"] = str(tmp_path / "deepspeed.json")
    change(launcher, deepspeed)
    (tmp_path / "deepspeed.json").write_text(json.dumps(deepspeed))
    (tmp_path / "edited.yaml").write_text(yaml.safe_dump(launcher))
    return str(tmp_path / "edited.yaml")


WRONG_FILES = {
    "another kind": ("fsdp2", lambda file, _: file.update(distributed_type="MEGATRON_LM"), "'MEGATRON_LM' is unknown"),
    "FSDP1": ("fsdp2", lambda file, _: file["fsdp_config"].update(fsdp_version=1), "fsdp_version: 1; valid: 2"),
    "no such shards": (
        "fsdp2",
        lambda file, _: file["fsdp_config"].update(fsdp_state_dict_type="LOCAL_STATE_DICT"),
        "'LOCAL_STATE_DICT' is unknown",
    ),
    "two plugins": (
        "zero2",
        lambda file, _: file.update(fsdp_config={"fsdp_version": 2}),
        "fsdp_config: has no effect with distributed_type DEEPSPEED",
    ),
    "a plugin without its kind": (
        "zero3",
        lambda file, _: file.update(distributed_type="NO"),
        "deepspeed_config: has no effect with distributed_type NO",
    ),
    "ZeRO-1": ("zero2", lambda _, zero: zero["zero_optimization"].update(stage=1), "stage of ZeRO: 1; valid: 2 or 3"),
    "weights that stay in shards": (
        "zero3",
        lambda _, zero: zero["zero_optimization"].pop("stage3_gather_16bit_weights_on_model_save"),
        "could not be saved; valid: true",
    ),
    "no file": (
        "zero2",
        lambda file, _: file["deepspeed_config"].update(deepspeed_config_file="none.json"),
        "none.json: .*No such file",
    ),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_file_that_is_wrong_is_refused(tmp_path, name):
    shipped, change, message = WRONG_FILES[name]
    with pytest.raises(ConfigError, match=message) as raised:
        read_sharding(edited(tmp_path, shipped, change))
    assert "\n" not in str(raised.value)


MISFITS = {
    "an optimizer of its own": ({}, "zero2", lambda _, zero: zero.update(optimizer={"type": "Lion"}), "optimizer"),
    "a batch of its own": ({}, "zero2", lambda _, zero: zero.update(train_batch_size=64), "train_batch_size: 64"),
    "clipping of its own": ({}, "zero3", lambda _, zero: zero.update(gradient_clipping=3.0), "max_grad_norm"),
    "another precision": ({}, "zero3", lambda _, zero: zero["bf16"].update(enabled=False), "ask for bf16; valid: auto"),
    "precision of the launcher": (
        {"training_arguments": {"bf16": False}},
        "fsdp2",
        lambda *_: None,
        "mixed_precision: 'bf16', but the recipe's training_arguments ask for no",
    ),
    "smaller slow micro-batches": (
        {"per_device_batch_size": 2, "slow_per_device_batch_size": 1},
        "zero2",
        lambda *_: None,
        "slow_per_device_batch_size: 1, but DeepSpeed",
    ),
    "batches by tokens": (
        {"tokens_per_batch": 4096},
        "zero3",
        lambda *_: None,
        "tokens_per_batch: 4096, but DeepSpeed",
    ),
    "4-bit weights": ({"lora": LoraRecipe(quantize=True)}, "fsdp2", lambda *_: None, "4-bit weights are not sharded"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_strategy_that_does_not_fit_the_recipe_is_refused(tmp_path, monkeypatch, name):
    changes, shipped, change, message = MISFITS[name]
    monkeypatch.setattr("dualspeed.settings.sharding.find_spec", lambda _: True)  # DeepSpeed is not needed to say so
    with pytest.raises(ConfigError, match=message) as raised:
        check_fit(read_sharding(edited(tmp_path, shipped, change)), settings_of(**changes).recipe)
    assert "\n" not in str(raised.value)


def test_shipped_files_fit(monkeypatch):
    monkeypatch.setattr("dualspeed.settings.sharding.find_spec", lambda _: True)
    for name, _ in KINDS:
        check_fit(read_sharding(f"config/accelerate/{name}.yaml"), settings_of().recipe)


def test_missing_deepspeed_is_said_with_its_remedy(monkeypatch):
    monkeypatch.setattr("dualspeed.settings.sharding.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="needs DeepSpeed; valid: pip install"):
        check_fit(read_sharding("config/accelerate/zero2.yaml"), settings_of().recipe)


@pytest.fixture
def started(stage_inputs, tmp_path):
    """Function that checks the start of a training on two processes whose run has a checkpoint."""
    chosen = settings_of()
    inputs = (chosen, stage_inputs / "base", stage_inputs / "data", tmp_path / "state")
    checkpoint = open_state(tmp_path / "state", *inputs[:3]) / "checkpoints" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    (checkpoint / "progress.json").write_text(json.dumps({"num_processes": 2, "sharding": "fsdp2", "seconds": 1.0}))

    def check(settings=chosen, processes=2, accelerate_config="config/accelerate/fsdp2.yaml"):
        check_start(settings, *inputs[1:], 1, processes, accelerate_config)

    return check


def test_a_run_goes_on_only_as_it_was_started(started):
    started()
    with pytest.raises(WorldSizeError, match="started on 2 processes and this job has 4"):
        started(processes=4)
    with pytest.raises(
        ShardingError, match="started with fsdp2 and this job has ddp, which can't read its checkpoints"
    ):
        started(accelerate_config=None)
    with pytest.raises(ConfigError, match="global_batch_size"):
        started(processes=3)


def test_missing_data_is_said_at_the_start(stage_inputs, tmp_path):
    with pytest.raises(CheckpointError, match=r"no \*\.arrow"):
        check_start(settings_of(), stage_inputs / "base", tmp_path, tmp_path / "state", 1, 2, None)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
@pytest.mark.parametrize("processes", [1, 8])
def test_accelerators_that_are_not_there_are_missed_at_the_start(stage_inputs, tmp_path, processes):
    chosen = settings_of(global_batch_size=8, training_arguments={"use_cpu": False})
    file = write_settings(chosen, tmp_path / "settings")
    command = [sys.executable, "-m", "dualspeed.cli", "train", "--settings", str(file), "--processes", str(processes)]
    command += ["--model", str(stage_inputs / "base"), "--data", str(stage_inputs / "data")]
    command += ["--state", str(tmp_path / "state"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"{processes} training processes with an accelerator each, but this machine has none; valid: " in line
