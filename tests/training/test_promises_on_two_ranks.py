"""Promises of the stock Trainer on several ranks: two processes of ours do what two stock ones do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from tests.support.paths import REPOSITORY
from tests.support.sharded import forced

WORKER = "tests.support.promises_worker"
TRAININGS = ("training", "accumulated", "by ranks", "stream")


def run(kind: str, folder: Path) -> list[dict]:
    """Records of both ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    finished = subprocess.run(
        [*launcher, "-m", WORKER, kind, str(folder)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env=forced(environment) if kind == "fsdp" else environment,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-5000:]
    return [torch.load(folder / f"record-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """Records of both ranks, with DistributedDataParallel."""
    return run("ddp", tmp_path_factory.mktemp("ddp"))


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAININGS)
def test_a_baseline_trains_as_the_stock_trainer_does(ranks, name):
    stock, ours = ranks[0][name]["stock"], ranks[0][name]["ours"]
    assert stock["distributed_type"] == ours["distributed_type"] == "MULTI_CPU"
    assert len(ours["logs"]) == len(stock["logs"])
    for one, other in zip(stock["logs"], ours["logs"], strict=True):
        assert {key: other.get(key) for key in one} == pytest.approx(one, rel=1e-4, abs=1e-6)
    assert_close(ours["weights"], stock["weights"], atol=1e-5, rtol=1e-4)
    assert ours["dispatches"] is False


@pytest.mark.slow
def test_a_loss_by_ranks_is_another_one(ranks):
    """The row above shows something: ranks have different numbers of supervised tokens."""
    whole, by_ranks = (ranks[0][name]["stock"]["logs"][0]["loss"] for name in ("training", "by ranks"))
    assert by_ranks != pytest.approx(whole, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAININGS)
def test_both_ranks_end_with_the_same_weights(ranks, name):
    for label in ("ours", "mixed"):
        one, other = (record[name][label]["weights"] for record in ranks)
        assert_close(one, other, atol=0, rtol=0)
    modes = {key for entry in ranks[0][name]["mixed"]["logs"] for key in entry}
    assert {"fast/ce_loss", "slow/ce_loss"} <= modes


@pytest.mark.slow
def test_predictions_have_the_stock_form(ranks):
    for record in ranks:
        stock, ours, mixed = (record["predictions"][label] for label in ("stock", "ours", "mixed"))
        assert ours["loss"] == pytest.approx(stock["loss"], rel=1e-5)
        for logits, labels in ((0, 1), (2, 3)):
            assert ours["arrays"][logits].shape == mixed["arrays"][logits].shape == stock["arrays"][logits].shape
            assert ours["arrays"][logits].shape[::2] == (7, 64)
            assert torch.equal(ours["arrays"][labels], stock["arrays"][labels])
            real = stock["arrays"][labels] != -100
            real[:, :-1] |= real[:, 1:].clone()  # the positions that predict
            assert_close(ours["arrays"][logits][real], stock["arrays"][logits][real], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_the_tower_trains_where_some_batches_have_no_image(ranks):
    one, other = (record["tower"] for record in ranks)
    assert one["changed"] == one["trainable"]
    assert any("vision_tower" in name for name in one["changed"])
    assert_close(one["weights"], other["weights"], atol=0, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_best_model_is_loaded_bit_for_bit(request, tmp_path, kind):
    records = run("fsdp", tmp_path) if kind == "fsdp" else request.getfixturevalue("ranks")
    for record in records:
        found = record["best"]
        assert found["distributed_type"] == {"ddp": "MULTI_CPU", "fsdp": "FSDP"}[kind]
        assert found["sharded"] == ({True} if kind == "fsdp" else {False})
        assert found["best"] == max(found["losses"], key=found["losses"].get)
        last = max(found["steps"])
        assert found["best"] < last
        for name in ("mode_isolator.weight", "vlm.lm_head.weight"):
            assert not torch.equal(found["steps"][last][name], found["steps"][found["best"]][name])
        assert_close(found["weights"], found["steps"][found["best"]], atol=0, rtol=0)
        assert found["again"] == found["losses"][found["best"]]
