"""Hashes of a job's inputs, by which its state folder is named: another content has another name.

All files of a folder count but those that are listed here with the reason why they decide nothing.
"""

import fnmatch
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dualspeed.errors import CheckpointError
from dualspeed.files import sha256_of_file, sha256_of_json
from dualspeed.layout import METRICS_FILE, TRAINING_RECORD, VALIDATION_FOLDER

DECIDE_NOTHING = {
    TRAINING_RECORD: "time and cost of the training that made the checkpoint",
    METRICS_FILE: "metrics of that training",
    "training_args.bin": "arguments of that training; the Trainer writes it and never reads it",
    "*.md": "text for people",
    "LICENSE*": "text for people",
    "NOTICE*": "text for people",
    ".*": "files of git, of the Hub and of systems",
    "*.h5": "weights for TensorFlow",
    "*.msgpack": "weights for Flax",
    "*.onnx": "weights for other programs",
    "*.gguf": "weights for other programs",
}
"""Pattern of files in a checkpoint that no job reads -> what they are."""
SAFE_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
UNSAFE_WEIGHTS = "pytorch_model*"
"""Weights that are not read where there are SAFE_WEIGHTS."""
WEIGHTS = ("*.safetensors", "*.bin")
DATASET_STATE = "state.json"


def checkpoint_fingerprint(folder: Path) -> str:
    """Hash of all that a checkpoint's folder says about model and processor: weights, settings, tokenizer, templates.

    Raises:
        CheckpointError: no weights are there, or no configuration.
    """
    return sha256_of_json(hashes(folder, checkpoint_files(folder)))


def checkpoint_files(folder: Path) -> list[Path]:
    """Files of a checkpoint that decide what it makes, in the order of their names."""
    has_safe = any((folder / name).exists() for name in SAFE_WEIGHTS)
    unread = [*DECIDE_NOTHING, *([UNSAFE_WEIGHTS] if has_safe else [])]
    found = [*folder.glob("*"), *folder.glob("additional_chat_templates/*")]
    files = sorted(
        path for path in found if path.is_file() and not any(fnmatch.fnmatch(path.name, pattern) for pattern in unread)
    )
    names = [path.name for path in files]
    if not any(fnmatch.filter(names, pattern) for pattern in WEIGHTS) or "config.json" not in names:
        raise CheckpointError(f"{folder}: there is no {' or '.join(WEIGHTS)} with a config.json in this folder")
    return files


def dataset_fingerprint(folder: Path) -> str:
    """Hash of a prepared dataset: rows, held-out rows, and manifests, which hold the checksums of its images.

    Raises:
        CheckpointError: no rows are there.
    """
    folders = [folder, folder / VALIDATION_FOLDER]
    rows = [path for each in folders for path in sorted(each.glob("*.arrow"))]
    if not rows:
        raise CheckpointError(f"{folder}: there is no *.arrow in this folder")
    others = [path for each in folders for path in sorted(each.glob("*.json")) if path.name != DATASET_STATE]
    states = {
        path.relative_to(folder).as_posix(): _dataset_state(path)
        for path in (each / DATASET_STATE for each in folders)
        if path.exists()
    }
    return sha256_of_json([hashes(folder, [*rows, *others]), states])


def hashes(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """{path from the folder: SHA-256 of the content}."""
    return {path.relative_to(folder).as_posix(): sha256_of_file(path) for path in files}


def _dataset_state(path: Path) -> Any:
    """Content of a dataset's state.json without its `_fingerprint`, which is another one every time it is written."""
    state = json.loads(path.read_text(encoding="utf-8"))
    return {key: value for key, value in state.items() if key != "_fingerprint"}
