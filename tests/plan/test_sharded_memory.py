"""The plan's memory against the bytes that two processes hold which really share a model and accumulate gradients."""

import json
import os
import subprocess
import sys

import pytest

from dualspeed.plan.flops import Sample, Trained
from dualspeed.plan.memory import ERROR, activation_bytes, peak_memory
from dualspeed.plan.shapes import make_shape
from tests.support import sharded, sharded_bytes
from tests.support.paths import REPOSITORY


def planned(kind: str, strategy: str) -> dict[str, float]:
    """Bytes held between micro-batches, and saved for the backward pass in each mode, by the plan's arithmetic."""
    part, method = sharded_bytes, sharded_bytes.METHOD
    shape = make_shape(part.TEXT, part.VISION, part.TEXT["vocab_size"], None)
    kept = shape.kept_tokens(56, 56, method.pruning_ratio, method.num_virtual_tokens, "image")
    sample = Sample(
        full_tokens=part.NUM_VISUAL + part.NUM_TEXT,
        fast_tokens=kept + part.NUM_TEXT,
        supervised_tokens=part.NUM_SUPERVISED,
        visual_tokens=part.NUM_VISUAL,
        encoded=shape.encoded(56, 56),
    )
    trained = Trained(language=True, lora_rank=part.LORA.rank if kind == "lora" else 0)
    peak = peak_memory(shape, sample, trained, {"fast": part.BATCH}, strategy, num_gpus=2, accumulates=True)
    saved = {
        name: activation_bytes(shape, sample, trained, mode, part.BATCH, is_sharded=True)[0]
        for name, mode in {"fast": "fast", "slow": "baseline"}.items()
    }
    return {"held": peak.weights + peak.optimizer + peak.gradients} | saved


@pytest.mark.slow
@pytest.mark.parametrize("strategy, kind", [("fsdp2", "full"), ("fsdp2", "lora"), ("zero2", "full"), ("zero3", "full")])
def test_memory_of_shards_is_within_a_tenth_of_what_is_measured(tmp_path, strategy, kind):
    if strategy != "fsdp2":
        sharded.require_deepspeed()
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes=2"]
    command += ["--config_file", f"config/accelerate/{strategy}.yaml", "--num_machines=1", "--main_process_port=0"]
    command += ["-m", "tests.support.sharded_bytes", str(tmp_path), kind]
    environment = sharded.forced(dict(os.environ), ACCELERATE_USE_CPU="true")
    environment["PYTHONPATH"] += f"{os.pathsep}{REPOSITORY}"
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    expected = planned(kind, strategy)
    for rank in range(2):
        measured = json.loads((tmp_path / f"bytes{rank}.json").read_text())
        assert measured["sharding"] == strategy
        assert measured["distributed_type"] == ("FSDP" if strategy == "fsdp2" else "DEEPSPEED")
        # After the first micro-batch of the last step, when the optimizer has its state.
        assert expected["held"] == pytest.approx(measured["held"][-2], rel=ERROR)
        for mode in ("fast", "slow"):
            assert expected[mode] == pytest.approx(measured["saved"][mode], rel=ERROR)
