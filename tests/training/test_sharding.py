"""Trainings whose processes really share a model: FSDP2, ZeRO-2 and ZeRO-3 in two CPU processes, by the shipped files.

accelerate shards on accelerators alone; tests/support/sharding makes it shard here, and each test asserts that it did.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import load_from_disk
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText

from dualspeed.layout import VALIDATION_FOLDER
from tests.support import sharded, tiny
from tests.support.stage import assert_same_weights

KINDS = {"full": False, "lora": True}


@pytest.fixture(scope="module")
def inputs(stage_inputs, tmp_path_factory) -> Path:
    """Folder with a base model in bfloat16, `base`, and conversations with held-out ones, `data`."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.make_llava(folder / "float32")
    model = AutoModelForImageTextToText.from_pretrained(folder / "float32", dtype=torch.bfloat16)
    model.save_pretrained(folder / "base")
    tiny.llava_processor().save_pretrained(folder / "base")
    shutil.copytree(stage_inputs / "data", folder / "data")
    load_from_disk(stage_inputs / "data").select(range(5)).save_to_disk(folder / "data" / VALIDATION_FOLDER)
    return folder


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory) -> dict[str, Path]:
    """Kind -> the model that one process trains, with the same micro-batches."""
    folder = tmp_path_factory.mktemp("alone")
    for kind, with_lora in KINDS.items():
        command = sharded.command_of(inputs, folder / kind, sharded.sharded_settings(with_lora), None, processes=1)
        done = sharded.run(command, folder / kind)
        assert done.returncode == 0, done.stderr[-4000:]
    return {kind: folder / kind / "out" for kind in KINDS}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", sharded.STRATEGIES)
def test_nothing_trained_is_lost(inputs, alone, tmp_path, strategy, kind):
    """A killed training resumes to the weights of an undisturbed one; one that can't be saved keeps its checkpoints."""
    if strategy != "fsdp2":
        sharded.require_deepspeed()
    chosen = sharded.sharded_settings(KINDS[kind])
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    command = sharded.command_of(inputs, straight, chosen, strategy)
    if kind == "full":
        failed = sharded.run(command, straight, SHARDING_SPOILS="delete_half")
        assert failed.returncode == 1
        (sentence,) = [line for line in failed.stderr.splitlines() if "dualspeed train: " in line]
        assert "the trained model was not saved whole" in sentence and "kept; start the training again" in sentence
        assert sharded.checkpoints(straight) and not (straight / "out").exists()
    # If that failed, the last checkpoint has the last step, and what follows only saves the model.
    done = sharded.run(command, straight)
    assert done.returncode == 0, done.stderr[-4000:]
    sharded.assert_sharded(straight, strategy)
    assert not sharded.checkpoints(straight)
    assert_trained_as_alone(straight / "out", alone[kind], inputs / "base")

    command = sharded.command_of(inputs, killed, chosen, strategy)
    sharded.kill_after_a_checkpoint(command, killed)
    done = sharded.run(command, killed)
    assert done.returncode == 0, done.stderr[-4000:]
    sharded.assert_sharded(killed, strategy)
    assert json.loads((killed / "out/training.json").read_text())["sharding"] == strategy
    assert_same_weights(killed / "out", straight / "out")
    if kind == "lora":
        names = ("adapter_model.safetensors", "projector.safetensors")
        files = [[load_file(folder / "out/adapter" / name) for name in names] for folder in (killed, straight)]
        assert_close(*files, atol=0, rtol=0)


def assert_trained_as_alone(together: Path, alone: Path, base: Path) -> None:
    """A stock model, moved as one process moves it, with the same losses, clipping and validation."""
    AutoModelForImageTextToText.from_pretrained(together)
    before, after, expected = (load_file(folder / "model.safetensors") for folder in (base, together, alone))
    assert after.keys() == before.keys() == expected.keys()
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    moved = {key for key in before if not after[key].equal(before[key])}
    assert any("language_model" in key for key in moved) and not any("vision_tower" in key for key in moved)
    for key in moved:
        change, wanted = (weights[key].float() - before[key].float() for weights in (after, expected))
        assert torch.nn.functional.cosine_similarity(change.flatten(), wanted.flatten(), dim=0) > 0.5, key
    assert_close(after, expected, atol=0.02, rtol=0.05)
    for name in ("fast/ce_loss", "slow/ce_loss", "slow/distillation_loss", "validation/ce_loss"):
        found, wanted = sharded.logged(together, name), sharded.logged(alone, name)
        assert wanted and found == pytest.approx(wanted, rel=0.05, abs=0.01), name
    assert max(sharded.logged(together, "grad_norm")) > sharded.MAX_GRAD_NORM
    assert len(sharded.logged(together, "validation/ce_loss")) == 2
