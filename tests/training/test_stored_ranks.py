"""Two processes share the encoding of images, and then train on kept features as one process does without."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.cached_worker import NUM_STEPS
from tests.support.noise import noise_image
from tests.support.paths import REPOSITORY
from tests.support.sharded import forced

pytestmark = pytest.mark.slow
NUM_IMAGES = 9
LAYERS = 2
# Images of the four samples of a step, of which each rank takes two: on both ranks, on none, on the first, the second.
COMPOSITIONS = [(1, 2, 1, 0), (0, 0, 0, 0), (1, 1, 0, 0), (0, 0, 0, 2)] * (NUM_STEPS // 4)


def run(folder: Path, kind: str, cache: str = "") -> list[dict]:
    """Record of each process."""
    out = folder / f"{kind}{bool(cache)}"
    out.mkdir()
    launcher = [sys.executable]
    if kind != "single":
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [*launcher, "-m", "tests.support.cached_worker", folder / "base", folder / "rows.json", out, cache, kind]
    finished = subprocess.run(
        list(map(str, command)),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env=forced(environment) if kind == "fsdp" else environment,
        timeout=180,
    )
    assert finished.returncode == 0, finished.stderr[-5000:]
    return [json.loads(path.read_text()) for path in sorted(out.glob("record-*.json"))]


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> tuple[Path, list[float]]:
    """Folder with model and rows, and the losses of a training in one process whose tower runs."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny.make_llava(folder / "base")
    paths = [str(folder / f"{number}.png") for number in range(NUM_IMAGES)]
    for number, path in enumerate(paths):
        noise_image((28, 28), seed=number, spread=20 + 20 * number).save(path)
    rows = []
    for index, number in enumerate(number for step in COMPOSITIONS for number in step):
        text = {"type": "text", "text": "what colour is the digit ?"}
        user = {"role": "user", "content": [{"type": "image"}] * number + [text]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": "red green" if index % 3 else "blue"}]}
        images = [paths[(index + place) % NUM_IMAGES] for place in range(number)]
        rows.append({"messages": [user, answer], "images": images})
    (folder / "rows.json").write_text(json.dumps(rows))
    (record,) = run(folder, "single")
    return folder, record["losses"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_encode_each_image_once_and_train_as_one(single, kind):
    folder, expected = single
    records = run(folder, kind, str(folder / f"cache-{kind}"))
    assert [record["distributed_type"] for record in records] == [{"ddp": "MULTI_CPU", "fsdp": "FSDP"}[kind]] * 2
    assert [record["sharded"] for record in records] == [kind == "fsdp"] * 2
    shown = {path for row in json.loads((folder / "rows.json").read_text()) for path in row["images"]}
    # In each process, a blank image when its model is made and two passes of the check, beside its share of the images.
    shares = [(len(shown) + 1) // 2, len(shown) // 2]
    assert [record["tiles"] for record in records] == [LAYERS * (share + 3) for share in shares]
    assert len(list((folder / f"cache-{kind}").glob("*/??/*"))) == len(shown)
    for record in records:
        assert record["losses"] == pytest.approx(expected, rel=1e-5)
