"""Keys of settings: what changes them, and what doesn't."""

import dataclasses
from dataclasses import dataclass, field

import pytest

from dualspeed.settings import identity
from dualspeed.settings.identity import key_of
from dualspeed.settings.method import DualSpeedConfig
from dualspeed.settings.model import ModelConfig, Stages
from dualspeed.settings.recipe import LoraRecipe, Recipe
from dualspeed.settings.stage import pretrain_key, pretrain_settings

RECIPE = Recipe(annotations="a.json", images="images", global_batch_size=4)


@dataclass(frozen=True, kw_only=True)
class LaterRecipe(Recipe):
    """A recipe of a later version, with settings that it didn't have before."""

    optional: int = 3
    listed: tuple[str, ...] = ()
    nested: LoraRecipe = field(default_factory=LoraRecipe)


def later(**changes) -> LaterRecipe:
    return LaterRecipe(**{one.name: getattr(RECIPE, one.name) for one in dataclasses.fields(RECIPE)}, **changes)


def test_a_new_optional_setting_changes_no_key():
    assert key_of(later()) == key_of(RECIPE)
    model, newer = (ModelConfig(source="demo", stages=Stages(pretrain=one, finetune=one)) for one in (RECIPE, later()))
    before, after = (pretrain_settings(one, DualSpeedConfig(), seed=0) for one in (model, newer))
    assert pretrain_key("m", before) == pretrain_key("m", after)


@pytest.mark.parametrize("change", [{"optional": 4}, {"listed": ("x",)}, {"nested": LoraRecipe(rank=4)}])
def test_a_setting_that_is_set_changes_the_key(change):
    assert key_of(later(**change)) != key_of(RECIPE)


@pytest.mark.parametrize("name", [one.name for one in dataclasses.fields(DualSpeedConfig)])
def test_every_setting_of_the_method_is_part_of_the_key(name):
    others = {"pruner": "random", "mode_schedule": "stratified", "prune_budget": "tile", "relevance_clip": "clip"}
    others |= {"pixel_pruning": 0.0, "num_virtual_tokens": 8, "slow_steps": 20}
    value = others.get(name, 0.5)
    assert key_of(DualSpeedConfig(**{name: value})) != key_of(DualSpeedConfig())


def test_how_processes_share_a_model_changes_no_key():
    assert key_of(dataclasses.replace(RECIPE, accelerate_config="fsdp2.yaml")) == key_of(RECIPE)


def test_a_new_generation_changes_every_key(monkeypatch):
    before = key_of(RECIPE)
    monkeypatch.setattr(identity, "GENERATION", identity.GENERATION + 1)
    assert key_of(RECIPE) != before


def test_defaults_are_those_of_this_generation():
    """A changed default changes results under the same key: whoever changes one raises GENERATION, then these."""
    assert identity.GENERATION == 1
    assert identity.record(DualSpeedConfig()) == {
        "pruner": "divprune",
        "pruning_ratio": 0.9,
        "slow_mode_ratio": 0.1,
        "slow_steps": None,
        "num_virtual_tokens": 4,
        "distillation_weight": 1.0,
        "distillation_temperature": 1.0,
        "mode_schedule": "bernoulli",
        "prune_budget": "image",
        "relevance_clip": None,
        "pixel_pruning": None,
    }
    assert identity.record(LoraRecipe()) == {"rank": 128, "alpha": 256, "dropout": 0.05, "quantize": False}
    assert identity.record(RECIPE) == {
        "annotations": "a.json",
        "images": "images",
        "data": [],
        "chat_template": "vicuna_v1",
        "max_length": 2048,
        "max_dropped_share": 0.05,
        "max_image_pixels": 178_956_970,
        "image_aspect_ratio": None,
        "validation_annotations": None,
        "global_batch_size": 4,
        "per_device_batch_size": None,
        "slow_per_device_batch_size": None,
        "tokens_per_batch": None,
        "slow_tokens_per_batch": None,
        "attn_implementation": None,
        "packing": False,
        "projector_learning_rate": None,
        "vision_learning_rate": None,
        "lora": None,
        "validation_steps": None,
        "training_arguments": {},
    }
