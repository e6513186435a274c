"""Two processes train as one does: the same losses, gradients and checkpoint."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText

from tests.support import tiny
from tests.support.distributed_worker import NUM_STEPS
from tests.support.paths import REPOSITORY
from tests.support.sharded import forced

WORKER = "tests.support.distributed_worker"
FAMILIES = {"llava": tiny.make_llava, "llava_next": tiny.make_llava_next}


def run(family: str, base: Path, out: Path, kind: str, *budgets: str) -> dict:
    """Train with `kind` = single, ddp or fsdp, and budgets of tokens or none; the first rank's record."""
    out.mkdir(parents=True)
    launcher = [sys.executable]
    if kind != "single":
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    if kind == "fsdp":
        environment = forced(environment)
    finished = subprocess.run(
        [*launcher, "-m", WORKER, family, str(base), str(out), kind, *budgets],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env=environment,
        timeout=180,
    )
    assert finished.returncode == 0, finished.stderr[-5000:]
    return torch.load(out / "record.pt")


@pytest.fixture(scope="module", params=["llava", pytest.param("llava_next", marks=pytest.mark.slow)])
def single(request, tmp_path_factory) -> tuple[str, Path, dict]:
    """Family, folder and record of the training in one process."""
    folder = tmp_path_factory.mktemp(request.param)
    FAMILIES[request.param](folder / "base")
    return request.param, folder, run(request.param, folder / "base", folder / "single", "single")


def assert_same_logs(logs: list[dict], expected: list[dict]) -> None:
    """Losses by mode, and counts, are those of both ranks: the first one has more supervised tokens than the second."""
    for entry, wanted in zip(logs, expected, strict=True):
        assert entry.keys() == wanted.keys()
        losses = {name: value for name, value in wanted.items() if name.endswith(("ce_loss", "distillation_loss"))}
        assert {name: entry[name] for name in losses} == pytest.approx(losses, rel=1e-4)
        if "loss" in wanted:
            assert len(losses) >= 1
            one, other = (log["tokens_per_second"] / log["samples_per_second"] for log in (entry, wanted))
            assert one == pytest.approx(other)  # tokens a sample, whatever the time
            assert entry["batches_without_supervision"] == wanted["batches_without_supervision"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_as_one(single, kind):
    family, folder, expected = single
    record = run(family, folder / "base", folder / kind, kind)
    assert record["find_unused_parameters"] is False
    assert record["distributed_type"] == {"ddp": "MULTI_CPU", "fsdp": "FSDP"}[kind]
    assert record["sharded"] == ({True} if kind == "fsdp" else {False})
    assert record["modes"] == expected["modes"]
    assert set(record["modes"][0:2]) == {"fast", "slow"}
    assert record["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert_same_logs(record["logs"], expected["logs"])
    assert record["validation"] == pytest.approx(expected["validation"], rel=1e-4)
    for step, gradients in enumerate(expected["gradients"]):
        assert record["gradients"][step].keys() == gradients.keys()
        assert_close(record["gradients"][step], gradients, atol=1e-5, rtol=1e-4)

    saved, stock = load_file(folder / kind / "saved" / "model.safetensors"), folder / "single" / "saved"
    assert saved.keys() == load_file(folder / "base" / "model.safetensors").keys()
    assert_close(saved, load_file(stock / "model.safetensors"), atol=1e-5, rtol=1e-4)
    AutoModelForImageTextToText.from_pretrained(folder / kind / "saved")
    isolators = [load_file(path / "mode_isolator.safetensors") for path in (folder / kind / "saved", stock)]
    assert_close(*isolators, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("single", ["llava"], indirect=True)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_batches_by_tokens_have_the_gradients_of_plain_ones(single, kind):
    """Longer samples need more micro-batches on one rank than on the other; FSDP needs as many on both."""
    family, folder, expected = single
    record = run(family, folder / "base", folder / f"tokens-{kind}", kind, "55", "75")
    assert record["distributed_type"] == {"ddp": "MULTI_CPU", "fsdp": "FSDP"}[kind]
    assert record["sharded"] == ({True} if kind == "fsdp" else {False})
    assert expected["micro_batches"] == [[1] * NUM_STEPS]
    wanted = [[2, 2, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 2, 2]]
    assert record["micro_batches"] == ([list(map(max, *wanted))] * 2 if kind == "fsdp" else wanted)
    assert record["modes"] == expected["modes"]
    assert record["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    for step, gradients in enumerate(expected["gradients"]):
        assert record["gradients"][step].keys() == gradients.keys()
        assert_close(record["gradients"][step], gradients, atol=1e-5, rtol=1e-4)
