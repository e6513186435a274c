"""The study of slow steps: its sheet, its schedules, and its fit."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest

from dualspeed.errors import ConfigError
from measurements.slow_steps import SHEET, StudyRow, read_study, slow_steps_of
from measurements.slow_steps_fit import fit_plane

ROW = StudyRow(
    id="row",
    steps=400,
    slow_steps=40,
    pruning_ratio=0.9,
    placement="even",
    window_start=0.0,
    window_end=1.0,
    num_virtual_tokens=4,
    distillation_weight=1.0,
    positions="packed",
    seed=0,
    role="variant",
)
WARMUP = 50


def places(**changes) -> np.ndarray:
    return np.flatnonzero(slow_steps_of(dataclasses.replace(ROW, **changes), WARMUP))


def test_every_schedule_of_the_sheet_has_its_number_of_slow_steps():
    rows = [row for row in read_study(SHEET) if not row.is_baseline]
    assert {row.role for row in rows} == {"fit", "test", "variant"}
    for row in rows:
        assert sum(slow_steps_of(row, WARMUP)) == row.slow_steps, row.id


def test_placements_are_where_they_say():
    assert places(window_start=0.5).min() >= 200 and len(places(window_start=0.5)) == 40
    assert places().mean() == pytest.approx(200, abs=10)
    assert places(placement="rising").mean() == pytest.approx(400 * 2 / 3, abs=10)
    by_rate = places(placement="rate")
    assert np.histogram(by_rate, [0, 100, 200, 300, 400])[0].tolist() == pytest.approx([14, 15, 8.5, 2], abs=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window_end": 1.5}, r"window_end: 1\.5 is out of range; valid: in \(0, 1\]"),
        ({"window_start": -0.1}, r"window_start: -0\.1 is out of range"),
        ({"window_start": 0.9, "window_end": 0.5}, r"window_start: 0\.9 of a window that ends at 0\.5; valid: below"),
        ({"slow_steps": 60, "window_start": 0.9}, "slow_steps: 60 don't fit into their window"),
        ({"placement": "late"}, "placement: 'late'"),
    ],
)
def test_a_schedule_that_is_none_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(ROW, **changes)


def test_the_fit_finds_the_plane_that_made_the_scores():
    frame = pd.DataFrame([(t, n) for t in (200, 400, 800) for n in (10, 20, 40)], columns=["steps", "slow_steps"])
    odds = -4 + 0.5 * np.log(frame["steps"]) + 1.1 * np.log(frame["slow_steps"])
    noise = np.random.default_rng(0).normal(scale=0.05, size=len(frame))
    fit = fit_plane(frame.assign(score=100 / (1 + np.exp(-odds - noise))))
    assert (np.abs(fit.coefficients - [-4, 0.5, 1.1]) < fit.errors).all()
    mean, low, high = fit.interval(1600, 40)
    assert low < 100 / (1 + math.exp(4 - 0.5 * math.log(1600) - 1.1 * math.log(40))) < high and low < mean < high
