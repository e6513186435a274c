"""`dualspeed train` on prepared data: what it writes, and that killing it loses nothing."""

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
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor

from dualspeed.cluster.run_lock import run_lock
from dualspeed.errors import InterruptedTrainingError, RunIsLiveError, WorldSizeError
from dualspeed.settings.stage import StageSettings
from dualspeed.training.resume import last_checkpoint, list_checkpoints, shield_workers
from dualspeed.training.stage import open_state, train
from measurements import kill
from tests.support.stage import NUM_STEPS, assert_same_weights, interruptible, run, settings


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
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert last_checkpoint(tmp_path / "none") is None


def command_of(inputs: Path, folder: Path, chosen: StageSettings) -> list[str]:
    """`dualspeed train` as a rule calls it."""
    command = [sys.executable, "-m", "dualspeed.cli", "train", "--settings", json.dumps(chosen.to_dict())]
    command += ["--model", str(inputs / "base"), "--data", str(inputs / "data")]
    return [*command, "--state", str(folder / "state"), "--out", str(folder / "out")]


def start(command: list[str], until: Callable[[], object]) -> subprocess.Popen:
    """A process in a group of its own, once `until` holds while it runs."""
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


def test_killed_and_resumed_equals_uninterrupted(inputs, whole, tmp_path):
    """SIGKILL once a checkpoint is there; the second job goes on, and no step is logged twice."""
    command = command_of(inputs, tmp_path, interruptible())
    process = start(command, lambda: list(tmp_path.glob("state/*/checkpoints/checkpoint-4")))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "out").exists()

    run(inputs, tmp_path, interruptible())
    assert_same_weights(tmp_path / "out", whole)
    assert logged_steps(tmp_path) == list(range(1, NUM_STEPS + 2))


def test_sigterm_to_all_processes_of_a_job_leaves_a_checkpoint_of_the_step(inputs, whole, tmp_path):
    """As scancel does it: data loading workers get the signal too."""
    process = start(command_of(inputs, tmp_path, interruptible()), lambda: len(logged_steps(tmp_path)) >= 3)
    os.killpg(process.pid, signal.SIGTERM)
    message = process.communicate(timeout=300)[1].strip().splitlines()[-1]
    assert process.returncode == 1
    steps = logged_steps(tmp_path)
    assert message.startswith(f"dualspeed train: SIGTERM: {len(steps)} of {NUM_STEPS + 1} steps are done and kept")
    checkpoints = next(tmp_path.glob("state/*/checkpoints"))
    assert last_checkpoint(checkpoints).name == f"checkpoint-{len(steps)}"
    assert len(list_checkpoints(checkpoints)) == 2

    run(inputs, tmp_path, interruptible())
    assert_same_weights(tmp_path / "out", whole)
    assert logged_steps(tmp_path) == list(range(1, NUM_STEPS + 2))


def test_a_data_loading_worker_ends_on_its_parents_sigterm_alone():
    """Slurm's must not end it, while Python's exit sends it one and waits."""
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


def test_training_stops_in_time_and_goes_on(inputs, whole, tmp_path):
    chosen, out = interruptible(), tmp_path / "out"
    arguments = (chosen, inputs / "base", inputs / "data", tmp_path / "state", out)
    handler = signal.getsignal(signal.SIGTERM)
    for step in (1, 2):
        with pytest.raises(InterruptedTrainingError, match=f"time is nearly over: {step} of {NUM_STEPS + 1} steps"):
            train(*arguments, time_limit=1e-6)
    assert signal.getsignal(signal.SIGTERM) == handler
    assert not out.exists()
    train(*arguments, time_limit=60)
    assert_same_weights(out, whole)
    assert logged_steps(tmp_path) == list(range(1, NUM_STEPS + 2))
    record = json.loads((out / "training.json").read_text())
    assert record["train_seconds"] > json.loads((whole / "training.json").read_text())["train_seconds"]


def test_a_job_that_ends_between_last_step_and_result_trains_no_step_more(inputs, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("dualspeed.training.stage.save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(inputs, tmp_path, interruptible())
    run(inputs, tmp_path, interruptible())
    assert_same_weights(tmp_path / "out", whole)
    assert json.loads((tmp_path / "out" / "training.json").read_text())["num_steps"] == NUM_STEPS + 1


def test_another_number_of_processes_is_refused(inputs, tmp_path):
    arguments = (interruptible(), inputs / "base", inputs / "data", tmp_path / "state", tmp_path / "out")
    with pytest.raises(InterruptedTrainingError):
        train(*arguments, time_limit=1e-6)
    progress = next(tmp_path.glob("state/*/checkpoints/checkpoint-1/progress.json"))
    progress.write_text(json.dumps(json.loads(progress.read_text()) | {"num_processes": 2}))
    with pytest.raises(WorldSizeError, match="started on 2 processes and this job has 1"):
        train(*arguments)


HOLD_LOCK = """
import pathlib, sys, time
from dualspeed.run_lock import run_lock
with run_lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_job_of_a_run_is_refused_until_the_first_has_ended(inputs, tmp_path):
    state = open_state(tmp_path / "state", settings(), inputs / "base", inputs / "data")
    holder = subprocess.Popen([sys.executable, "-c", HOLD_LOCK, str(state)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RunIsLiveError, match=rf"{state.name}: process {holder.pid} on .* trains this run; wait for it"):
        run(inputs, tmp_path, settings())
    assert not list(state.glob("*.jsonl"))
    holder.kill()
    holder.communicate()
    with run_lock(state):
        pass


@pytest.mark.slow
def test_five_kills_at_random_moments_lose_nothing(tmp_path):
    """benchmarks/kill.py does thirty."""
    kills, problems = kill.kill_and_compare(tmp_path, num_kills=5, seed=1)
    assert kills["writing a checkpoint"]
    assert problems == []
