"""Prompt formats in a configuration: which one a stage has that names none."""

from pathlib import Path

import pytest
import yaml

from dualspeed.errors import ConfigError
from dualspeed.settings.identity import identity, key_of
from dualspeed.settings.project import Project, load_project
from tests.support.paths import REPOSITORY


def load(folder: Path, templates: dict[str, str], source: str | None = None) -> Project:
    """The demo's project with templates only where `templates` says: {pretrain, finetune or model: name}."""
    content = yaml.safe_load((REPOSITORY / "config/demo/config.yaml").read_text())
    (model,) = content["models"].values()
    model["source"] = source or str(folder)
    for stage, recipe in model["stages"].items():
        del recipe["chat_template"]
        recipe |= {"chat_template": templates[stage]} if stage in templates else {}
    model |= {"chat_template": templates["model"]} if "model" in templates else {}
    return load_project(content | {"experiments": str(REPOSITORY / "config/demo/experiments.tsv")}, "config.yaml")


def templates_of(project: Project) -> tuple[str, str]:
    (model,) = project.models.values()
    return model.stages.pretrain.chat_template, model.stages.finetune.chat_template


@pytest.mark.parametrize(
    "templates, expected",
    [
        ({}, ("auto", "auto")),
        ({"model": "turns"}, ("turns", "turns")),
        ({"model": "vicuna_v1", "pretrain": "plain"}, ("plain", "vicuna_v1")),
        ({"pretrain": "plain", "finetune": "turns"}, ("plain", "turns")),
        ({"finetune": "turns"}, ("auto", "turns")),
    ],
)
def test_a_model_of_ones_own_has_its_own_template_unless_another_is_named(templates, expected, tmp_path):
    assert templates_of(load(tmp_path, templates)) == expected


def test_a_model_that_the_workflow_makes_has_vicunas(tmp_path):
    assert templates_of(load(tmp_path, {}, source="demo")) == ("vicuna_v1", "vicuna_v1")
    assert templates_of(load(tmp_path, {"model": "auto"}, source="demo")) == ("auto", "auto")


def test_the_template_of_ones_own_model_is_part_of_its_keys(tmp_path):
    own, vicuna = load(tmp_path, {}), load(tmp_path, {"model": "vicuna_v1"})
    recipes = [project.finetune_settings(project.rows[0]).recipe for project in (own, vicuna)]
    assert identity(recipes[0])["chat_template"] == "auto"
    assert "chat_template" not in identity(recipes[1])
    assert key_of(recipes[0]) != key_of(recipes[1])


@pytest.mark.parametrize(
    "templates, message",
    [
        ({"model": "qwen"}, "config.yaml: models.tiny.chat_template: 'qwen' is unknown; valid: auto, plain, turns"),
        (
            {"pretrain": "plain"},
            "config.yaml: models.tiny.stages.finetune.chat_template: 'auto' behind a pretraining in 'plain', which its "
            "checkpoint has as its own; valid: 'auto' in both, or a name",
        ),
    ],
)
def test_a_template_that_cannot_be_used_is_one_clear_error(templates, message, tmp_path):
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, templates)
    assert message in str(raised.value)
