"""Helpers of the modules that write official files."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
LETTER_ANSWER = "\nAnswer with the option's letter from the given choices directly."


def write_image(path: Path, seed: int) -> None:
    """Write an image of noise, unless the file exists."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (28, 28, 3), dtype=np.uint8)).save(path)


def write_lines(path: Path, records: list[dict]) -> None:
    """Write a JSON lines file."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
