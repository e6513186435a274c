"""Measurement of step times on a tiny model: its record, and the calls of the pruner that it times."""

import json

import pytest

from dualspeed import DualSpeedConfig, DualSpeedModel
from dualspeed.settings.speed import SpeedSettings
from dualspeed.training.step_times import measure_speed, time_pruner, training_steps
from tests.support import tiny
from tests.support.batches import collate, sample

KEYS = {"theory_u", "pruner_seconds", "peak_memory_bytes", "batch_size", "sequence_length", "repeats", "threads"}


@pytest.mark.parametrize("pruner", ["divprune", "visionzip"])
def test_a_measurement_has_every_number(stage_inputs, tmp_path, pruner):
    method = DualSpeedConfig(pruner=pruner, pruning_ratio=0.7)
    settings = SpeedSettings(dualspeed=method, chat_template="turns", batch_size=3, repeats=2)
    measure_speed(stage_inputs / "base", stage_inputs / "data", tmp_path / "speed.json", settings)
    measured = json.loads((tmp_path / "speed.json").read_text())
    by_mode = {f"{mode}_{unit}" for mode in ("baseline", "fast", "slow") for unit in ("step_seconds", "flops")}
    assert measured.keys() == KEYS | by_mode | {"machine"}
    assert (measured["batch_size"], measured["repeats"], measured["threads"]) == (3, 2, 1)
    assert 0 < measured["pruner_seconds"] < measured["fast_step_seconds"]
    assert measured["theory_u"] == measured["fast_flops"] / measured["baseline_flops"] < 1


def test_each_call_of_the_pruner_is_timed_and_changes_nothing():
    """The pruner runs once in a fast step, once for the teacher of a slow step, and not in Baseline's."""
    model = DualSpeedModel(tiny.llava(), DualSpeedConfig(pruning_ratio=0.5))
    batch = collate([sample("llava", seed, 1) for seed in range(2)])
    steps = training_steps(model, batch)
    num_calls = {}
    for name, step in steps.items():
        with time_pruner(model) as seconds:
            step()
        num_calls[name] = len(seconds)
        assert all(value > 0 for value in seconds)
        step()
        assert len(seconds) == num_calls[name]
    assert num_calls == {"baseline": 0, "fast": 1, "slow": 1}
    expected = model(**batch, mode="fast").loss
    with time_pruner(model):
        assert model(**batch, mode="fast").loss == expected
