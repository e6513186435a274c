"""The demo's project with changes, and sheets, for tests of what is read and refused."""

import json
from pathlib import Path
from typing import Any

import yaml

from dualspeed.settings.project import Project, load_project
from tests.support.paths import REPOSITORY

DEMO = REPOSITORY / "config/demo/experiments.tsv"
CONFIG = yaml.safe_load((REPOSITORY / "config/demo/config.yaml").read_text())


def load(sheet: Path = DEMO, **changes: Any) -> Project:
    """The demo's project with dotted keys (written with __) set; None as a value deletes the key."""
    content = json.loads(json.dumps(CONFIG)) | {"experiments": str(sheet)}
    for key, value in changes.items():
        *parents, last = key.split("__")
        block = content
        for parent in parents:
            block = block[parent]
        block[last] = value
    return load_project(content, "config.yaml")


def write_sheet(folder: Path, *rows: str) -> Path:
    """A sheet whose rows are given as `column=value` words."""
    cells = [dict(word.split("=") for word in row.split()) for row in rows]
    columns = list(dict.fromkeys(column for row in cells for column in row))
    lines = ["\t".join(columns), *("\t".join(row.get(column, "") for column in columns) for row in cells)]
    (folder / "experiments.tsv").write_text("\n".join(lines) + "\n")
    return folder / "experiments.tsv"
