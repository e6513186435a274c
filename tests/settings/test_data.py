"""A recipe's `data`: what a source may say, which keys follow, and paths that have to be there."""

import re

import pytest

from dualspeed.errors import ConfigError
from dualspeed.settings.identity import identity, key_of
from dualspeed.settings.model import ModelConfig, Stages
from dualspeed.settings.paths import check_paths
from dualspeed.settings.reading import read_dataclass
from dualspeed.settings.recipe import Recipe
from dualspeed.settings.sources import Source

SHORT = {"annotations": "a.json", "images": "images", "global_batch_size": 4}


def recipe(*data, **settings):
    return read_dataclass(Recipe, {"data": list(data), "global_batch_size": 4} | settings, "config.yaml", "finetune")


def test_a_recipe_with_annotations_keeps_its_key():
    """All that its key is made of, as before there was `data`."""
    assert identity(read_dataclass(Recipe, SHORT, "config.yaml")) == SHORT


def test_every_field_of_a_source_is_part_of_the_key():
    one = {"hub": "acme/mix"}
    changes = [{}, {"config": "a"}, {"split": "b"}, {"format": "texts"}, {"images": "c"}, {"share": 0.5}, {"limit": 3}]
    keys = {key_of(recipe(one | change)) for change in [*changes, {"hub": "acme/other"}]}
    assert len(keys) == 8
    assert key_of(recipe(one, {"path": "x"})) != key_of(recipe({"path": "x"}, one))
    assert identity(recipe(one))["data"] == [one]


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        ([{}], {}, "finetune.data[0].path: None with hub None; valid: one of both"),
        ([{"path": "x", "hub": "a/b"}], {}, "data[0].path: 'x' with hub 'a/b'; valid: one of both"),
        ([{"path": "x"}, {"path": "y", "config": "c"}], {}, "data[1].config: 'c' with path 'y'; valid: with hub alone"),
        ([{"hub": "mix"}], {}, "data[0].hub: 'mix' names no dataset; valid: owner/name"),
        ([{"path": "x", "share": 0.5, "limit": 3}], {}, "data[0].share: 0.5 with limit 3; valid: one of both"),
        ([{"path": "x", "share": 0.0}], {}, "data[0].share: 0.0 is out of range; valid: in (0, 1], or null"),
        ([{"path": "x", "share": 50}], {}, "data[0].share: 50.0 is out of range"),
        ([{"path": "x", "limit": 0}], {}, "data[0].limit: 0 is out of range; valid: above 0"),
        ([{"path": "x", "format": "chat"}], {}, "data[0].format: 'chat' is unknown"),
        ([{"path": "x", "shares": 1}], {}, "data[0].shares: unknown key (did you mean 'share'?)"),
        ([], {}, "finetune.annotations: missing; valid: LLaVA conversations, or `data`, a list of sources"),
        ([{"path": "x"}], SHORT, "annotations: 'a.json' with 1 sources of data"),
        ([{"path": "x"}], {"validation_annotations": "v", "validation_steps": 1}, "images: missing"),
        (
            [{"path": "x"}, {"path": "v"}],
            {"validation_annotations": "v", "validation_steps": 1, "images": "i"},
            "validation_annotations: 'v' is trained on",
        ),
    ],
)
def test_what_a_source_may_not_say_is_named(data, settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        recipe(*data, **settings)


def test_images_of_annotations_must_be_named():
    with pytest.raises(ConfigError, match="images: missing; valid: the folder that image paths start from"):
        Recipe(annotations="a.json", global_batch_size=4)


def check(one, downloads=None):
    stages = Stages(pretrain=one, finetune=one)
    check_paths({"m": ModelConfig(source="demo", stages=stages)}, {}, downloads or {}, "results/data/demo")


def test_paths_of_sources_have_to_be_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "images").mkdir()
    here = {"path": "a.json", "images": "images"}
    check(recipe(here, {"hub": "acme/mix"}, {"path": "a.json"}))
    check(recipe({"hub": "acme/mix", "images": "made"}, {"path": str(tmp_path), "images": "made"}, images="made"))
    for data, message in (
        ([here, {"path": "gone.json"}], r"models.m.stages.pretrain.data\[1\].path: 'gone.json' does not exist"),
        ([here | {"images": "gone"}], r"data\[0\].images: 'gone' does not exist"),
        ([here | {"images": "a.json"}], r"data\[0\].images: 'a.json' is not a folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            check(recipe(*data))
    with pytest.raises(ConfigError, match=r"pretrain.images: 'gone' does not exist"):
        check(recipe({"path": "a.json"}, images="gone"))
    source = Source(kind="hub", repo="acme/mix", folder="data/mix")
    check(recipe({"path": "data/mix/rows.parquet"}, {"path": "data/mix/a.json", "images": "data/mix"}), {"mix": source})
