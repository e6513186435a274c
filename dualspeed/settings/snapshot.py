"""The settings that a DAG was built from, for those of its jobs that a cluster runs later.

Such a job reads the workflow anew, and would take a cell that was edited in the meantime for what it was started with.
The environment, which Slurm hands on, says where the frozen settings lie.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dualspeed.files import sha256_of_json, write_atomic, write_json

FROZEN = "DUALSPEED_FROZEN"


def freeze(config: Mapping[str, Any], rows: str, folder: Path) -> None:
    """Keep the configuration and the text of its sheet under a name of their content, and tell the jobs where."""
    sheet = Path(config["experiments"])
    target = Path(folder).resolve() / sha256_of_json([dict(config), rows])[:16]
    write_atomic(target / sheet.name, rows)
    write_json(target / "config.json", dict(config) | {"experiments": str(target / sheet.name)})
    os.environ[FROZEN] = str(target / "config.json")


def read_frozen() -> dict[str, Any]:
    """The configuration that `freeze` kept for this job; empty where none was."""
    return json.loads(Path(os.environ[FROZEN]).read_text(encoding="utf-8")) if FROZEN in os.environ else {}
