"""Sheets and configurations that people, programs and spreadsheets damaged: rows and settings, or one sentence."""

import json

import pytest
import yaml

from dualspeed.settings.project import load_project
from dualspeed.settings.sheet_file import COLUMNS, read_sheet
from dualspeed.settings.yaml_file import read_yaml
from tests.support.mutations import mutated_text, mutated_values
from tests.support.paths import REPOSITORY

SHEETS = [(REPOSITORY / f"config/demo/experiments{name}.tsv").read_text() for name in ("", "-full")]
TEXT = (REPOSITORY / "config/demo/config.yaml").read_text()
CONTENT = yaml.safe_load(TEXT)


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


def test_sheets(fuzz, tmp_path):
    """A sheet is read whole or not at all: every line with content is a row or a comment."""
    path = tmp_path / "experiments.tsv"

    def check(content):
        path.write_bytes(content)
        rows = read_sheet(path)
        text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        lines = [line.strip(' \t"') for line in text.split("\n")]
        assert len(rows) == sum(bool(line) and not line.startswith("#") for line in lines) - 1
        assert all(list(row) == list(COLUMNS) for row in rows)
        project = load_project(CONTENT | {"experiments": str(path)}, "config.yaml")
        assert len({(row.model, row.method, row.settings_hash) for row in project.rows}) == len(rows)
        return "read"

    counts = fuzz("sheet of experiments", mutated_text(SHEETS[:1]), check)
    assert {"read", "refused (ConfigError)"} <= set(counts)


def test_configurations(fuzz):
    def check(content):
        if isinstance(content, str):
            return "no settings"
        load_project(content, "config.yaml")
        return "read"

    counts = fuzz("configuration (values)", mutated_values([CONTENT]), check)
    assert {"read", "refused (ConfigError)"} <= set(counts)


def test_yaml(fuzz, tmp_path):
    path = tmp_path / "config.yaml"

    def check(content):
        path.write_bytes(content)
        read_yaml(path)
        load_project(path)
        return "read"

    json_text = json.dumps(CONTENT)
    counts = fuzz("configuration (YAML)", mutated_text([TEXT, json_text]), check)
    assert {"read", "refused (ConfigError)"} <= set(counts)
