"""Paths that nothing makes: a mistyped one is an error when the configuration is read, whatever is there already."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from dualspeed.errors import ConfigError
from dualspeed.settings.project import load_project
from tests.support.samples import entry
from tests.support.workflow import REPOSITORY, snakemake

FINETUNE = "models.tiny.stages.finetune"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Copy of the demo's configuration, which is the working folder."""
    for name in ("config", "workflow", "profiles"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    shutil.copy(REPOSITORY / "Snakefile", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def change(project, place, value):
    """Set a dotted place of config.yaml."""
    file = project / "config/demo/config.yaml"
    content = yaml.safe_load(file.read_text())
    *path, key = place.split(".")
    holder = content
    for part in path:
        holder = holder[part]
    holder[key] = value
    file.write_text(yaml.safe_dump(content, sort_keys=False))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (f"{FINETUNE}.annotations", "mine.json", f"{FINETUNE}.annotations: 'mine.json' does not exist; valid: what"),
        (f"{FINETUNE}.annotations", "x" * 300, "x' does not exist"),
        (f"{FINETUNE}.validation_annotations", "no/v.json", f"{FINETUNE}.validation_annotations: 'no/v.json' does not"),
        (f"{FINETUNE}.images", "no/images", f"{FINETUNE}.images: 'no/images' does not exist"),
        (f"{FINETUNE}.images", "Snakefile", f"{FINETUNE}.images: 'Snakefile' is not a folder"),
        ("benchmarks.pope.folder", "no/pope", r"benchmarks.pope.folder: 'no/pope' does not exist"),
        ("benchmarks.pope.folder", "Snakefile", r"benchmarks.pope.folder: 'Snakefile' is not a folder"),
        ("models.tiny.relevance_clip", "no/clip", r"models.tiny.relevance_clip: 'no/clip' does not exist"),
        ("models.tiny.source", "no/model", r"models.tiny.source: 'no/model' does not exist"),
        ("results", "elsewhere", r"'results/data/demo/.*' does not exist"),
    ],
)
def test_a_path_that_nothing_makes_has_to_exist(place, value, message, project):
    load_project("config/demo/config.yaml")
    change(project, place, value)
    with pytest.raises(ConfigError, match=message):
        load_project("config/demo/config.yaml")


@pytest.mark.parametrize("key", ["language_model", "vision_tower", "projector"])
def test_a_part_that_nothing_makes_has_to_exist(key, project):
    parts = {"family": "llava", "language_model": "there", "vision_tower": "there", "projector": "there"}
    (project / "there").mkdir()
    change(project, "models.tiny.source", "parts")
    change(project, "models.tiny.parts", parts)
    load_project("config/demo/config.yaml")
    change(project, "models.tiny.parts", parts | {key: "no/part"})
    with pytest.raises(ConfigError, match=rf"models.tiny.parts.{key}: 'no/part' does not exist"):
        load_project("config/demo/config.yaml")


def test_what_a_download_or_preparation_makes_need_not_exist(project):
    files = [{"url": "http://localhost:1/data.zip", "unpack": "."}]
    change(project, "downloads", {"own": {"kind": "url", "folder": "data/own", "files": files}})
    change(project, "benchmarks.pope.folder", "data/own/pope")
    change(project, f"{FINETUNE}.images", "data")
    change(project, f"{FINETUNE}.annotations", "data/own/parquet")
    change(project, f"{FINETUNE}.images", "images/in/parquet")
    load_project("config/demo/config.yaml")


def test_mistyped_annotations_of_prepared_data_stop_the_workflow(project):
    """Snakemake alone plans nothing: with its input missing, it takes what an earlier run prepared as it is."""
    (project / "images").mkdir()
    Path("mine.json").write_text(json.dumps([entry("q", "a")]))
    change(project, f"{FINETUNE}.annotations", "mine.json")
    change(project, f"{FINETUNE}.images", "images")
    prepared = "results/prepared/tiny/finetune"
    (project / prepared).mkdir(parents=True)
    change(project, f"{FINETUNE}.annotations", "mime.json")
    output = snakemake(project, "-n", prepared)
    assert f"{FINETUNE}.annotations: 'mime.json' does not exist; valid: what exists, or a download" in output
    assert "Nothing to be done" not in output
