"""`cache_features` decides no result, and what contradicts it is refused when the configuration is read."""

import dataclasses

import pytest

from dualspeed.errors import ConfigError
from dualspeed.settings.finetune import read_options
from dualspeed.settings.identity import key_of, record
from dualspeed.settings.method import DualSpeedConfig
from dualspeed.settings.recipe import Recipe
from dualspeed.settings.stage import StageSettings

RECIPE = Recipe(annotations="a.json", images="images", global_batch_size=4)
KEPT = dataclasses.replace(RECIPE, cache_features="kept")
OPTIONS = ["--model", "m", "--data", "d", "--output-dir", "o", "--cache-features", "kept"]


def test_it_is_part_of_no_key_and_no_record():
    assert key_of(KEPT) == key_of(RECIPE)
    assert record(KEPT) == record(RECIPE)
    assert read_options(OPTIONS).run.cache_features == "kept"
    assert read_options(OPTIONS).flat() == read_options(OPTIONS[:-2]).flat()


def test_a_trained_tower_is_refused():
    with pytest.raises(ConfigError, match=r"cache_features: 'kept', but with vision_learning_rate 1e-06 the tower's"):
        dataclasses.replace(KEPT, vision_learning_rate=1e-6)
    with pytest.raises(ConfigError, match="cache_features: the vision tower is trained by vision_learning_rate; valid"):
        read_options([*OPTIONS, "--vision-learning-rate", "1e-6"])


def test_pruned_pixels_are_refused():
    pruned = DualSpeedConfig(pixel_pruning=0.1)
    with pytest.raises(ConfigError, match=r"cache_features: 'kept', but with pixel_pruning 0\.1 other pixels enter"):
        StageSettings(stage="finetune", seed=0, recipe=KEPT, dualspeed=pruned)
    StageSettings(stage="finetune", seed=0, recipe=RECIPE, dualspeed=pruned)
    with pytest.raises(ConfigError, match=r"cache_features: 'kept', but with pixel_pruning 0\.1 other pixels enter"):
        read_options([*OPTIONS, "--pixel-pruning", "0.1"])
