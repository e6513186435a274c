"""The state folder of a training: its name, and the checkpoints in it. Without torch, so that a look is quick.

The name is a hash of all that decides the result: settings and inputs (inputs.py). So the state of other settings or
inputs is never resumed.
"""

import json
import logging
from pathlib import Path
from typing import Any

from dualspeed.errors import ShardingError, WorldSizeError
from dualspeed.files import sha256_of_json, write_json
from dualspeed.settings.identity import key_of, record
from dualspeed.settings.stage import StageSettings
from dualspeed.training.inputs import hashes_of_inputs

TRAINER_STATE, PROGRESS = "trainer_state.json", "progress.json"
CHECKPOINTS = "checkpoints"
logger = logging.getLogger(__name__)


def open_state(state_root: Path, settings: StageSettings, model_folder: Path, data_folder: Path) -> Path:
    """Create or find the state folder of this stage, and write its settings and the hashes of its inputs to it."""
    inputs = hashes_of_inputs(settings, model_folder, data_folder)
    name = sha256_of_json({"settings": key_of(settings, num_digits=64), **inputs})[:16]
    write_json(state_root / name / "settings.json", {"settings": record(settings), **inputs})
    return state_root / name


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in a folder, the newest first."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2]))


def last_checkpoint(folder: Path) -> Path | None:
    """Newest readable checkpoint in a folder, or None."""
    for checkpoint in list_checkpoints(folder):
        try:
            json.loads((checkpoint / TRAINER_STATE).read_text())
            return checkpoint
        except (FileNotFoundError, json.JSONDecodeError):
            logger.warning("%s is incomplete: training resumes from an older one, if there is one", checkpoint)
    return None


def read_progress(checkpoint: Path | None) -> dict[str, Any]:
    """Content of a checkpoint's progress.json; empty without a checkpoint or without the file."""
    file = checkpoint / PROGRESS if checkpoint else None
    return json.loads(file.read_text()) if file and file.exists() else {}


def check_num_processes(checkpoint: Path | None, num_processes: int) -> None:
    """Raise WorldSizeError if the run was started on another number of processes."""
    before = read_progress(checkpoint).get("num_processes", num_processes)
    if checkpoint and before != num_processes:
        raise WorldSizeError(
            f"this run was started on {before} processes and this job has {num_processes}: it would see its data in "
            f"another order. Run it on {before}, or delete {checkpoint.parent} to train it from its first step"
        )


def check_sharding(checkpoint: Path | None, sharding: str) -> None:
    """Raise ShardingError if the run's checkpoints are those of another sharding, in its name (Sharding.name)."""
    before = read_progress(checkpoint).get("sharding", sharding)
    if checkpoint and before != sharding:
        raise ShardingError(
            f"this run was started with {before} and this job has {sharding}, which can't read its checkpoints. Give "
            f"it the accelerate_config of {before}, or delete {checkpoint.parent} to train it from its first step"
        )
