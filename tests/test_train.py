"""`dualspeed train` on prepared data: what it writes, and that killing it loses nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from dualspeed import DualSpeedConfig
from dualspeed.config import StageSettings
from dualspeed.recipe import Recipe
from dualspeed.train import last_checkpoint, open_state, train

NUM_STEPS = 12


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A base checkpoint and a prepared dataset of 24 conversations."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.make_llava(folder / "base")
    rows = []
    for index in range(24):
        path = folder / f"{index}.png"
        Image.new("RGB", (28, 28), ((index * 40) % 256, (index * 90) % 256, 128)).save(path)
        question = [{"type": "text", "text": "is there a red digit ?"}]
        answer = [{"type": "text", "text": "yes" if index % 2 else "no"}]
        has_image = index % 4 != 3
        rows.append(
            {
                "id": str(index),
                "messages": [
                    {"role": "user", "content": [{"type": "image", "text": None}] * has_image + question},
                    {"role": "assistant", "content": answer},
                ],
                "images": [str(path)] * has_image,
                "num_tokens": 30,
            }
        )
    Dataset.from_list(rows).save_to_disk(folder / "data")
    return folder


def settings(stage: str = "finetune", seed: int = 0, **dualspeed) -> StageSettings:
    recipe = Recipe(
        annotations="unused.json",
        images="unused",
        chat_template="turns",
        global_batch_size=4,
        training_arguments={
            "use_cpu": True,
            "max_steps": NUM_STEPS,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 2,
        },
    )
    config = DualSpeedConfig(**({"slow_mode_ratio": 0.4, "pruning_ratio": 0.7} | dualspeed))
    return StageSettings(stage=stage, seed=seed, recipe=recipe, dualspeed=config)


def run(inputs: Path, folder: Path, chosen: StageSettings, model: Path | None = None) -> Path:
    train(chosen, model or inputs / "base", inputs / "data", folder / "state", folder / "out")
    return folder / "out"


def test_finetuned_checkpoint_is_stock_and_documented(inputs, tmp_path):
    out = run(inputs, tmp_path, settings())
    AutoModelForImageTextToText.from_pretrained(out)
    assert "generation" in AutoProcessor.from_pretrained(out).chat_template
    record = json.loads((out / "training.json").read_text())
    assert (record["stage"], record["num_steps"], record["num_samples"]) == ("finetune", NUM_STEPS, 4 * NUM_STEPS)
    assert 0 < record["num_slow_steps"] < NUM_STEPS
    assert record["train_seconds"] > 0
    metrics = [json.loads(line) for path in tmp_path.glob("state/*/metrics.jsonl") for line in path.open()]
    assert [entry["step"] for entry in metrics if "loss" in entry["metrics"]] == list(range(1, NUM_STEPS + 1))
    assert [json.loads(line) for line in (out / "metrics.jsonl").open()] == metrics
    assert not list(tmp_path.glob("state/*/checkpoints"))


def test_pretraining_moves_projector_and_isolator_alone(inputs, tmp_path):
    out = run(inputs, tmp_path, settings("pretrain", slow_mode_ratio=0.0))
    before, after = load_file(inputs / "base" / "model.safetensors"), load_file(out / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith("multi_modal_projector.") for name in moved)


def test_isolator_goes_from_one_stage_to_the_next(inputs, tmp_path):
    """Finetuning for no step at all keeps what pretraining has learned."""
    pretrained = run(inputs, tmp_path / "1", settings("pretrain", slow_mode_ratio=0.0))
    chosen = settings("finetune", seed=5)
    chosen.recipe.training_arguments["learning_rate"] = 0.0
    finetuned = run(inputs, tmp_path / "2", chosen, model=pretrained)
    isolators = [load_file(folder / "mode_isolator.safetensors") for folder in (pretrained, finetuned)]
    assert torch.equal(isolators[0]["mode_isolator.weight"], isolators[1]["mode_isolator.weight"])


def test_another_setting_or_input_has_another_state(inputs, tmp_path):
    base, data = inputs / "base", inputs / "data"
    first = open_state(tmp_path, settings(), base, data)
    assert open_state(tmp_path, settings(), base, data) == first
    others = [
        open_state(tmp_path, settings(seed=1), base, data),
        open_state(tmp_path, settings(pruning_ratio=0.6), base, data),
        open_state(tmp_path, settings(), run(inputs, tmp_path, settings("pretrain")), data),
    ]
    assert len({first, *others}) == 4


def test_a_torn_checkpoint_is_passed_over(tmp_path):
    for step, content in ((2, "{}"), (4, '{"epoch": 0.')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(content)
    (tmp_path / "checkpoint-6").mkdir()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert last_checkpoint(tmp_path / "none") is None


def test_killed_and_resumed_equals_uninterrupted(inputs, tmp_path):
    """SIGKILL once a checkpoint is there; the second job goes on, and no step is logged twice."""
    whole = run(inputs, tmp_path / "whole", settings())
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "dualspeed.cli", "train", "--settings", json.dumps(settings().to_dict())]
    command += ["--model", str(inputs / "base"), "--data", str(inputs / "data")]
    command += ["--state", str(folder / "state"), "--out", str(folder / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(folder.glob("state/*/checkpoints/checkpoint-4/trainer_state.json")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "out").exists()

    subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)
    for name, value in load_file(whole / "model.safetensors").items():
        assert torch.equal(load_file(folder / "out" / "model.safetensors")[name], value), name
    metrics = [json.loads(line) for path in folder.glob("state/*/metrics.jsonl") for line in path.open()]
    steps = [entry["step"] for entry in metrics if "loss" in entry["metrics"]]
    assert steps == sorted(set(steps)) == list(range(1, NUM_STEPS + 1))
