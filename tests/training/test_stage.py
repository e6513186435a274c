"""`dualspeed train` on prepared data: its files, and that a kill loses nothing."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor

from dualspeed.cluster.run_lock import run_lock
from dualspeed.errors import IncompleteModelError, InterruptedTrainingError, RunIsLiveError, WorldSizeError
from dualspeed.settings.jobs import write_settings
from dualspeed.settings.stage import StageSettings
from dualspeed.training.resume import ResumableTrainer, shield_workers
from dualspeed.training.stage import train
from dualspeed.training.state import last_checkpoint, list_checkpoints, open_state
from measurements import kill
from tests.support.stage import NUM_STEPS, assert_same_weights, interruptible_settings, stage_settings, train_stage


def test_finetuned_checkpoint_is_stock_and_documented(stage_inputs, tmp_path):
    out = train_stage(stage_inputs, tmp_path, stage_settings())
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


def test_pretraining_moves_projector_and_isolator_alone(stage_inputs, tmp_path):
    out = train_stage(stage_inputs, tmp_path, stage_settings("pretrain", slow_mode_ratio=0.0))
    before, after = load_file(stage_inputs / "base" / "model.safetensors"), load_file(out / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith("multi_modal_projector.") for name in moved)


def test_isolator_goes_from_one_stage_to_the_next(stage_inputs, tmp_path):
    """Finetuning with a learning rate of 0 keeps the pretrained isolator."""
    pretrained = train_stage(stage_inputs, tmp_path / "1", stage_settings("pretrain", slow_mode_ratio=0.0))
    chosen = stage_settings("finetune", seed=5)
    chosen.recipe.training_arguments["learning_rate"] = 0.0
    finetuned = train_stage(stage_inputs, tmp_path / "2", chosen, model=pretrained)
    isolators = [load_file(folder / "mode_isolator.safetensors") for folder in (pretrained, finetuned)]
    assert torch.equal(isolators[0]["mode_isolator.weight"], isolators[1]["mode_isolator.weight"])


def test_another_setting_or_input_has_another_state(stage_inputs, tmp_path):
    base, data = stage_inputs / "base", stage_inputs / "data"
    first = open_state(tmp_path, stage_settings(), base, data)
    assert open_state(tmp_path, stage_settings(), base, data) == first
    others = [
        open_state(tmp_path, stage_settings(seed=1), base, data),
        open_state(tmp_path, stage_settings(pruning_ratio=0.6), base, data),
        open_state(tmp_path, stage_settings(), train_stage(stage_inputs, tmp_path, stage_settings("pretrain")), data),
    ]
    assert len({first, *others}) == 4


def test_a_new_optional_setting_has_the_same_state(stage_inputs, tmp_path):
    """At its default it is no part of the folder's name, at another value it is."""
    new_field = ("new_setting", int, dataclasses.field(default=3))
    extended = dataclasses.make_dataclass(
        "Extended",
        [new_field],
        bases=(StageSettings,),
        frozen=True,
        kw_only=True,
        namespace={"__post_init__": lambda _: None},
    )
    chosen = stage_settings()
    fields = {field.name: getattr(chosen, field.name) for field in dataclasses.fields(chosen)}
    states = [
        open_state(tmp_path, settings, stage_inputs / "base", stage_inputs / "data")
        for settings in (chosen, extended(**fields), extended(**fields, new_setting=4))
    ]
    assert states[0] == states[1] != states[2]
    assert json.loads((states[2] / "settings.json").read_text())["settings"]["new_setting"] == 4


def test_a_torn_checkpoint_is_passed_over(tmp_path):
    for step, content in ((2, "{}"), (4, '{"epoch": 0.')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(content)
    (tmp_path / "checkpoint-6").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert last_checkpoint(tmp_path / "none") is None


def command_of(stage_inputs: Path, folder: Path, chosen: StageSettings) -> list[str]:
    """`dualspeed train` as a rule calls it."""
    settings = write_settings(chosen, folder / "settings")
    command = [sys.executable, "-m", "dualspeed.cli", "train", "--settings", str(settings)]
    command += ["--model", str(stage_inputs / "base"), "--data", str(stage_inputs / "data")]
    return [*command, "--state", str(folder / "state"), "--out", str(folder / "out")]


def start(command: list[str], until: Callable[[], object]) -> subprocess.Popen:
    """Start a process in a group of its own and return it when `until` holds."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 600
    while not until():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    return process


def logged_steps(folder: Path) -> list[int]:
    metrics = [json.loads(line) for path in folder.glob("state/*/metrics.jsonl") for line in path.open()]
    return [entry["step"] for entry in metrics if "loss" in entry["metrics"]]


def test_killed_and_resumed_equals_uninterrupted(stage_inputs, uninterrupted, tmp_path):
    """SIGKILL after the first checkpoints; the second job resumes, and no step is logged twice."""
    command = command_of(stage_inputs, tmp_path, interruptible_settings())
    process = start(command, lambda: list(tmp_path.glob("state/*/checkpoints/checkpoint-4")))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "out").exists()

    train_stage(stage_inputs, tmp_path, interruptible_settings())
    assert_same_weights(tmp_path / "out", uninterrupted)
    assert logged_steps(tmp_path) == list(range(1, NUM_STEPS + 2))


def test_sigterm_to_all_processes_of_a_job_leaves_a_checkpoint_of_the_step(stage_inputs, uninterrupted, tmp_path):
    """As with scancel, data loading workers get the signal too."""
    process = start(
        command_of(stage_inputs, tmp_path, interruptible_settings()), lambda: len(logged_steps(tmp_path)) >= 3
    )
    os.killpg(process.pid, signal.SIGTERM)
    message = process.communicate(timeout=300)[1].strip().splitlines()[-1]
    assert process.returncode == 1
    steps = logged_steps(tmp_path)
    assert message.startswith(f"dualspeed train: SIGTERM: {len(steps)} of {NUM_STEPS + 1} steps are done and kept")
    checkpoints = next(tmp_path.glob("state/*/checkpoints"))
    assert last_checkpoint(checkpoints).name == f"checkpoint-{len(steps)}"
    assert len(list_checkpoints(checkpoints)) == len(list(checkpoints.iterdir())) == 2

    train_stage(stage_inputs, tmp_path, interruptible_settings())
    assert_same_weights(tmp_path / "out", uninterrupted)
    assert logged_steps(tmp_path) == list(range(1, NUM_STEPS + 2))


def test_a_data_loading_worker_ends_on_its_parents_sigterm_alone():
    """A SIGTERM from Slurm must not end it, while Python sends it one at exit and waits for it."""
    batches = iter(shield_workers(DataLoader(range(64), num_workers=1, prefetch_factor=1)))
    next(batches)
    (worker,) = batches._workers
    for _ in range(3):
        subprocess.run(["sh", "-c", f"kill -TERM {worker.pid}"], check=True)
    assert [int(batch) for batch in batches] == list(range(1, 64))

    batches = iter(shield_workers(DataLoader(range(64), num_workers=1, prefetch_factor=1)))
    next(batches)
    (worker,) = batches._workers
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == 0


def test_training_stops_in_time_and_goes_on(stage_inputs, uninterrupted, tmp_path):
    chosen, out = interruptible_settings(), tmp_path / "out"
    arguments = (chosen, stage_inputs / "base", stage_inputs / "data", tmp_path / "state", out)
    handler = signal.getsignal(signal.SIGTERM)
    for step in (1, 2):
        with pytest.raises(InterruptedTrainingError, match=f"time is nearly over: {step} of {NUM_STEPS + 1} steps"):
            train(*arguments, time_limit=1e-6)
    assert signal.getsignal(signal.SIGTERM) == handler
    assert not out.exists()
    train(*arguments, time_limit=60)
    assert_same_weights(out, uninterrupted)
    assert logged_steps(tmp_path) == list(range(1, NUM_STEPS + 2))
    record = json.loads((out / "training.json").read_text())
    assert record["train_seconds"] > json.loads((uninterrupted / "training.json").read_text())["train_seconds"]


def test_a_job_that_ends_between_last_step_and_result_trains_no_step_more(
    stage_inputs, uninterrupted, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr("dualspeed.training.stage.save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_stage(stage_inputs, tmp_path, interruptible_settings())
    train_stage(stage_inputs, tmp_path, interruptible_settings())
    assert_same_weights(tmp_path / "out", uninterrupted)
    assert json.loads((tmp_path / "out" / "training.json").read_text())["num_steps"] == NUM_STEPS + 1


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a file in place."""
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


NORM = "language_model.model.norm.weight"
SPOILS = {
    "a weight is missing": (lambda out: rewrite(out / "model.safetensors", lambda found: found.pop(NORM)), "missing"),
    "a weight is not finite": (
        lambda out: rewrite(out / "model.safetensors", lambda found: found[NORM].fill_(torch.nan)),
        "not finite",
    ),
    "the weights are cut": (
        lambda out: os.truncate(out / "model.safetensors", 1000),
        "model.safetensors|header|offset",
    ),
    "no weights": (lambda out: (out / "model.safetensors").unlink(), "model.safetensors"),
    "no isolator": (lambda out: (out / "mode_isolator.safetensors").unlink(), "mode_isolator"),
    "another isolator": (
        lambda out: rewrite(
            out / "mode_isolator.safetensors",
            lambda found: found.update({key: found[key][:1].clone() for key in found}),
        ),
        "has shape",
    ),
    "no tokenizer": (lambda out: (out / "tokenizer.json").unlink(), "no processor"),
}


@pytest.mark.parametrize("name", SPOILS)
def test_a_model_that_is_not_saved_whole_keeps_its_checkpoints(stage_inputs, tmp_path, monkeypatch, name):
    spoil, message = SPOILS[name]
    chosen = stage_settings()
    chosen.recipe.training_arguments.update(max_steps=1)
    stock = ResumableTrainer.save_model
    with monkeypatch.context() as patch:

        def save_model(self, folder=None, _internal_call=False):
            stock(self, folder, _internal_call)
            if not _internal_call:
                spoil(Path(folder))

        patch.setattr(ResumableTrainer, "save_model", save_model)
        with pytest.raises(
            IncompleteModelError, match=f"was not saved whole .*({message}).* were kept; start"
        ) as raised:
            train_stage(stage_inputs, tmp_path, chosen)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob("state/*/checkpoints/checkpoint-1"))
    AutoModelForImageTextToText.from_pretrained(train_stage(stage_inputs, tmp_path, chosen))
    assert not list(tmp_path.glob("state/*/checkpoints"))


def test_another_number_of_processes_is_refused(stage_inputs, tmp_path):
    arguments = (
        interruptible_settings(),
        stage_inputs / "base",
        stage_inputs / "data",
        tmp_path / "state",
        tmp_path / "out",
    )
    with pytest.raises(InterruptedTrainingError):
        train(*arguments, time_limit=1e-6)
    progress = next(tmp_path.glob("state/*/checkpoints/checkpoint-1/progress.json"))
    progress.write_text(json.dumps(json.loads(progress.read_text()) | {"num_processes": 2}))
    with pytest.raises(WorldSizeError, match="started on 2 processes and this job has 1"):
        train(*arguments)


HOLD_LOCK = """
import pathlib, sys, time
from dualspeed.cluster.run_lock import run_lock
with run_lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_job_of_a_run_is_refused_until_the_first_has_ended(stage_inputs, tmp_path):
    state = open_state(tmp_path / "state", stage_settings(), stage_inputs / "base", stage_inputs / "data")
    holder = subprocess.Popen([sys.executable, "-c", HOLD_LOCK, str(state)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RunIsLiveError, match=rf"{state.name}: process {holder.pid} on .* trains this run; wait for it"):
        train_stage(stage_inputs, tmp_path, stage_settings())
    assert not list(state.glob("*.jsonl"))
    holder.kill()
    holder.communicate()
    with run_lock(state):
        pass


@pytest.mark.slow
def test_five_kills_at_random_moments_lose_nothing(tmp_path):
    """measurements/kill.py does thirty."""
    kills, problems = kill.kill_and_compare(tmp_path, num_kills=5, seed=1)
    assert kills["writing a checkpoint"]
    assert problems == []
