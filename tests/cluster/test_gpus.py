"""profiles/gpu: no two jobs share a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dualspeed.cluster.gpus import take_gpus

# Reserves GPUs, then replaces itself by another program, as training does by `accelerate launch`.
JOB = """
import os, sys
from dualspeed.cluster.gpus import take_gpus
take_gpus(int(sys.argv[1]))
program = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); input()"
os.execv(sys.executable, [sys.executable, "-c", program])
"""


def start(tmp_path: Path, count: int, **variables: str) -> subprocess.Popen:
    environment = {"TMPDIR": str(tmp_path), "DUALSPEED_NUM_GPUS": "3", **variables}
    command = [sys.executable, "-c", JOB, str(count)]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_jobs_see_gpus_of_their_own_and_wait_for_free_ones(tmp_path):
    first, second = start(tmp_path, 2), start(tmp_path, 1)
    seen = [set(job.stdout.readline().strip().split(",")) for job in (first, second)]
    assert [len(devices) for devices in seen] == [2, 1]
    assert seen[0] | seen[1] == {"0", "1", "2"}
    third = start(tmp_path, 1)
    first.kill()
    first.wait()
    assert third.stdout.readline().strip() in seen[0]
    for job in (second, third):
        job.communicate("\n")


def test_gpus_of_cuda_visible_devices_are_the_ones_to_share(tmp_path):
    job = start(tmp_path, 1, CUDA_VISIBLE_DEVICES="5,7")
    assert job.stdout.readline().strip() == "5"
    job.communicate("\n")


def test_more_gpus_than_there_are_is_an_error(monkeypatch):
    monkeypatch.setenv("DUALSPEED_NUM_GPUS", "2")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ValueError, match="needs 4 GPUs, and all jobs here share 2"):
        take_gpus(4)


def test_too_many_gpus_end_a_command_in_one_sentence(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    folders = [f"--{name}={tmp_path / name}" for name in ("settings", "model", "data", "out")]
    done = subprocess.run(
        [sys.executable, "-m", "dualspeed.cli", "speed", "--gpus", "2", *folders],
        env=environment | {"DUALSPEED_NUM_GPUS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == "dualspeed speed: this job needs 2 GPUs, and all jobs here share 1\n"


def test_where_nothing_is_shared_out_nothing_is_taken(monkeypatch):
    monkeypatch.delenv("DUALSPEED_NUM_GPUS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    take_gpus(1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"
