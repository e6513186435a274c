"""Settings of the method in a checkpoint: written whole, and read back from files of older versions too."""

import json

import pytest

from dualspeed import DualSpeedConfig, DualSpeedModel
from dualspeed.errors import ConfigError
from dualspeed.method.checkpoint import read_method_settings
from tests.support import tiny


def test_method_settings_of_older_checkpoints_load_and_broken_ones_are_named(tmp_path):
    """A checkpoint from before `relevance_clip` existed has the default."""
    assert read_method_settings(tmp_path) is None
    file = tmp_path / "dualspeed.json"
    older = {
        "pruner": "random",
        "pruning_ratio": 0.7,
        "slow_mode_ratio": 0.2,
        "num_virtual_tokens": 2,
        "distillation_weight": 1.0,
        "distillation_temperature": 1.0,
        "mode_schedule": "bernoulli",
        "prune_budget": "image",
    }
    file.write_text(json.dumps(older))
    assert read_method_settings(tmp_path) == DualSpeedConfig(**older)
    file.write_text(json.dumps(older | {"prunr": "random"}))
    with pytest.raises(ConfigError, match=r"dualspeed\.json: prunr: unknown key"):
        read_method_settings(tmp_path)


def test_saved_method_settings_hold_every_field(tmp_path):
    model = DualSpeedModel(tiny.llava(), DualSpeedConfig(slow_mode_ratio=0.3))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "dualspeed.json").read_text())
    assert DualSpeedConfig(**saved) == model.dualspeed == read_method_settings(tmp_path)
    assert set(saved) == set(DualSpeedConfig.__dataclass_fields__)


@pytest.mark.parametrize("value", [None, "0.1", float("nan"), 1.5, -0.1])
def test_a_share_that_is_no_number_of_the_range_is_refused_by_name(value):
    with pytest.raises(ConfigError, match=r"slow_mode_ratio: .* is out of range; valid: in \[0, 1\]"):
        DualSpeedConfig(slow_mode_ratio=value)
