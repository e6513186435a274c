"""The setting slow_steps: an exact number of slow steps instead of a share of them."""

import itertools

import pytest

from dualspeed import DualSpeedConfig, Mode
from dualspeed.errors import ConfigError
from dualspeed.plan.costs import modes_of
from dualspeed.settings.finetune import read_options
from dualspeed.settings.sheet import Row
from dualspeed.settings.sheet import read_row as read_cells
from dualspeed.settings.sheet_file import COLUMNS
from dualspeed.settings.stage import pretrain_settings
from tests.support.projects import load, write_sheet


def slow_places(slow_steps: int, num_steps: int, seed: int) -> list[int]:
    config = DualSpeedConfig(slow_steps=slow_steps)
    return [step for step in range(num_steps) if config.mode_of_step(seed, step, num_steps) is Mode.SLOW]


@pytest.mark.parametrize("num_steps", [1, 7, 10, 97, 800])
def test_the_number_is_exact_and_the_steps_are_evenly_spaced(num_steps):
    for slow_steps, seed in itertools.product({1, 2, num_steps // 3, num_steps - 1, num_steps}, range(5)):
        if 1 <= slow_steps <= num_steps:
            places = slow_places(slow_steps, num_steps, seed)
            assert len(places) == slow_steps
            # The training taken as a circle: the gap over its end is a gap like the others.
            gaps = {later - one for one, later in itertools.pairwise([*places, places[0] + num_steps])}
            assert gaps <= {num_steps // slow_steps, -(-num_steps // slow_steps)}


def test_seeds_begin_at_different_steps():
    assert len({slow_places(8, 800, seed)[0] for seed in range(20)}) > 10


def test_a_number_replaces_the_share():
    assert DualSpeedConfig(slow_steps=20).slow_share(800) == 0.025
    assert DualSpeedConfig(slow_mode_ratio=0.3).slow_share(800) == 0.3
    row = read(slow_steps=20)
    assert row.slow_settings == {"slow_mode_ratio": None, "slow_steps": 20}
    assert modes_of(load().finetune_settings(row), num_steps=800) == {"fast": 0.975, "slow": 0.025}


def read(**cells) -> Row:
    """A DualSpeed row of the demo's project with these cells."""
    given = dict.fromkeys(COLUMNS) | {"id": "x", "model": "tiny", "method": "dualspeed"} | cells
    return read_cells(given, load().models, "sheet.tsv")


def test_rows_that_differ_in_slow_steps_share_pretraining_and_step_times():
    rows = [read(slow_steps=20), read(slow_steps=40), read(slow_mode_ratio=0.2)]
    assert len({row.pretrain_key for row in rows}) == len({row.speed_key for row in rows}) == 1
    assert len({row.settings_hash for row in rows}) == 3
    settings = pretrain_settings(load().models["tiny"], rows[0].dualspeed, 0)
    assert settings.dualspeed.slow_steps is None and settings.dualspeed.slow_mode_ratio == 0


def test_a_row_may_be_longer_than_its_recipe():
    row = read(max_steps=900, slow_steps=850)
    usual, longer = (load().finetune_settings(one).recipe.training_arguments for one in (read(), row))
    assert (usual["max_steps"], longer["max_steps"]) == (800, 900)
    assert row.pretrain_key == read().pretrain_key and row.speed_key == read().speed_key


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ("method=dualspeed slow_steps=801", "slow_steps: 801 of 800 steps; valid: at most the training's steps"),
        ("method=dualspeed slow_steps=21 max_steps=20", "slow_steps: 21 of 20 steps"),
        ("method=dualspeed slow_steps=20 slow_mode_ratio=0.1", "slow_steps: 20 beside slow_mode_ratio 0.1; valid: one"),
        ("method=dualspeed slow_steps=0", "slow_steps: 0 is out of range; valid: 1 or more"),
        ("method=dualspeed slow_steps=2.5", "slow_steps: '2.5' is no int"),
        ("method=baseline slow_steps=20", "slow_steps: 20 contradicts the method baseline; valid: empty"),
        ("method=dualspeed max_steps=0", "max_steps: 0 is out of range; valid: above 0, or empty"),
    ],
)
def test_a_sheet_that_contradicts_itself_is_refused(tmp_path, cells, message):
    with pytest.raises(ConfigError, match="row x: ") as caught:
        load(write_sheet(tmp_path, f"id=x model=tiny {cells}"))
    assert message in str(caught.value)


def test_both_settings_are_refused_in_python_and_as_options():
    with pytest.raises(ConfigError, match=r"slow_steps: 20 beside slow_mode_ratio 0\.2; valid: one of the two"):
        DualSpeedConfig(slow_steps=20, slow_mode_ratio=0.2)
    with pytest.raises(ConfigError, match="mode_schedule: 'stratified' has no effect with slow_steps"):
        DualSpeedConfig(slow_steps=20, mode_schedule="stratified")
    given = "--model m --data d --output-dir o --slow-steps 20 --slow-mode-ratio 0.1"
    with pytest.raises(ConfigError, match=r"slow_steps: 20 beside slow_mode_ratio 0\.1"):
        read_options(given.split())
