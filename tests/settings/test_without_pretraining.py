"""Models whose `stages` have no pretraining: rows start from the base model; what needs a pretraining is refused."""

import pytest
import yaml

from dualspeed.errors import ConfigError
from dualspeed.settings.project import load_project
from tests.support.paths import REPOSITORY

PARTS = {"family": "llava", "language_model": "config", "vision_tower": "config"}


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


def load(pretrain=None, **changes):
    """The demo without its pretraining, unless `pretrain` changes its recipe, and with other keys of its model."""
    content = yaml.safe_load((REPOSITORY / "config/demo/config.yaml").read_text())
    model = content["models"]["tiny"]
    model |= changes
    model["stages"]["pretrain"] = None if pretrain is None else model["stages"]["pretrain"] | pretrain
    return load_project(content, "config.yaml")


def test_rows_start_from_the_base_model_and_keep_keys_of_their_own():
    without, with_one, another = load(), load(pretrain={}), load(pretrain={"max_length": 77})
    assert all(row.pretrain_key is None and without.pretrain_settings(row) is None for row in without.rows)
    assert all(row.pretrain_key for row in with_one.rows)
    hashes = [{row.settings_hash for row in project.rows} for project in (without, with_one, another)]
    assert len(set.union(*hashes)) == 3 * len(without.rows)
    assert without.finetune_settings(without.rows[0]) == with_one.finetune_settings(with_one.rows[0])
    assert without.models["tiny"].resources_of("pretrain") == without.models["tiny"].resources_of("finetune")


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"source": "parts", "parts": PARTS},
            "stages.pretrain: missing, and the projector of `parts` has random weights; valid: a recipe, or a",
        ),
        (
            {"resources": {"pretrain": {"gpu": 2}}},
            "resources.pretrain: given without stages.pretrain; valid: both or neither",
        ),
    ],
)
def test_what_needs_a_pretraining_is_refused_without_one(changes, message):
    with pytest.raises(ConfigError, match=message):
        load(**changes)
    if "parts" in changes:
        changes = changes | {"parts": PARTS | {"projector": "README.md"}}
        assert load(**changes).rows[0].pretrain_key is None
