"""A job of a cluster runs with the settings that its DAG was built from, whatever has become of the files since."""

import os
import re
from pathlib import Path

import yaml

from dualspeed.settings.jobs import read_settings
from dualspeed.settings.snapshot import FROZEN, freeze, read_frozen
from dualspeed.settings.stage import StageSettings
from tests.support.workflow import TARGETS, edit_cell, shrunk_project, snakemake


def settings_of_finetuning(project: Path, *arguments: str) -> StageSettings:
    """Settings that a dry run would hand the finetuning."""
    output = snakemake(project, "-n", "--printshellcmds", *arguments, TARGETS[0])
    files = re.findall(r"dualspeed train --settings (\S+) --model", output)
    settings = [read_settings(StageSettings, project / file) for file in files]
    return next(one for one in settings if one.stage == "finetune")


def test_a_job_reads_what_was_frozen_and_snakemake_itself_the_files(tmp_path, monkeypatch):
    monkeypatch.delenv(FROZEN, raising=False)
    project = shrunk_project(tmp_path)
    monkeypatch.chdir(project)
    before = settings_of_finetuning(project)
    config = yaml.safe_load(Path("config/demo/config.yaml").read_text())
    freeze(config, Path(config["experiments"]).read_text(), project / "results/state/snapshots")
    edit_cell("pruning_ratio", "0.5")(project)
    Path("config/demo/config.yaml").write_text("in the: [middle of an edit")
    assert settings_of_finetuning(project, "--mode", "remote") == before


def test_equal_settings_are_frozen_once(tmp_path, monkeypatch):
    monkeypatch.setenv(FROZEN, "")
    sheet = tmp_path / "experiments.tsv"
    sheet.write_text("id\n")
    config = {"experiments": str(sheet), "name": "demo"}
    for rows in ("id\n", "id\n", "id\nmore\n"):
        freeze(config, rows, tmp_path / "frozen")
    assert len(list((tmp_path / "frozen").iterdir())) == 2
    frozen = read_frozen()
    assert frozen["name"] == "demo"
    assert Path(frozen["experiments"]).read_text() == "id\nmore\n"
    assert Path(os.environ[FROZEN]).is_absolute()
