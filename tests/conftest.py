"""Fixtures that several folders share; one thread a test process.

Small models are quickest on one thread, and equal thread counts give equal sums.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from PIL import Image

from tests.support import tiny
from tests.support.stage import interruptible_settings, train_stage

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--pictures", metavar="FOLDER", help="folder for the screenshots of tests/reporting/test_pictures.py"
    )
    parser.addoption(
        "--fuzz-inputs", type=int, default=300, help="mutated inputs for each reader in tests/fuzz (make fuzz: 20000)"
    )


@pytest.fixture(scope="module")
def stage_inputs(tmp_path_factory) -> Path:
    """Folder with a base checkpoint, `base`, and a prepared dataset of 24 conversations, `data`."""
    folder = tmp_path_factory.mktemp("stage_inputs")
    tiny.make_llava(folder / "base")
    rows = []
    for index in range(24):
        path = folder / f"{index}.png"
        Image.new("RGB", (28, 28), ((index * 40) % 256, (index * 90) % 256, 128)).save(path)
        question = [{"type": "text", "text": "is there a red digit ?"}]
        answer = [{"type": "text", "text": "yes" if index % 2 else "no"}]
        has_image = index % 4 != 3
        rows.append(
            {
                "id": str(index),
                "messages": [
                    {"role": "user", "content": [{"type": "image", "text": None}] * has_image + question},
                    {"role": "assistant", "content": answer},
                ],
                "images": [str(path)] * has_image,
                "num_tokens": 30,
            }
        )
    Dataset.from_list(rows).save_to_disk(folder / "data")
    return folder


@pytest.fixture(scope="module")
def uninterrupted(stage_inputs, tmp_path_factory) -> Path:
    """Checkpoint of a training of `interruptible_settings` that nothing interrupted."""
    return train_stage(stage_inputs, tmp_path_factory.mktemp("uninterrupted"), interruptible_settings())
