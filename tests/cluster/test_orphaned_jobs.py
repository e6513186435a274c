"""`dualspeed end-jobs` cancels the Slurm jobs of this folder's killed snakemake, and no others."""

import subprocess
import sys
from pathlib import Path

import pytest

from dualspeed.cluster import orphaned_jobs
from dualspeed.cluster.orphaned_jobs import end_jobs
from dualspeed.errors import OrphanedJobsError
from tests.support.paths import REPOSITORY

# Slurm's queue is a file of lines "id name"; `scancel` removes the ids that it is given.
SQUEUE = "#!/bin/sh\ncat {queue}\n"
SCANCEL = '#!/bin/sh\nfor id in "$@"; do sed -i "/^$id /d" {queue}; done\n'


@pytest.fixture
def queue(tmp_path, monkeypatch) -> Path:
    """Queue with two jobs of the folder's run and one of another folder, and the programs that read and change it."""
    queue = tmp_path / "queue"
    queue.write_text("7 run-a\n8 another-run\n9 run-a\n")
    for name, text in {"squeue": SQUEUE, "scancel": SCANCEL}.items():
        write_program(tmp_path / "bin" / name, text.format(queue=queue))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    logs = tmp_path / ".snakemake/log"
    logs.mkdir(parents=True)
    (logs / "one.log").write_text("Building DAG of jobs...\nSLURM run ID: run-a\n")
    return queue


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def test_jobs_of_this_folder_are_cancelled_and_no_others(queue, tmp_path):
    assert end_jobs(tmp_path) == ["7", "9"]
    assert queue.read_text() == "8 another-run\n"
    assert end_jobs(tmp_path) == []


def test_jobs_that_do_not_end_are_an_error(queue, tmp_path, monkeypatch):
    write_program(tmp_path / "bin/scancel", "#!/bin/sh\n")
    monkeypatch.setattr(orphaned_jobs, "WAIT_SECONDS", 0)
    with pytest.raises(OrphanedJobsError, match="Slurm jobs 7 9 have not ended"):
        end_jobs(tmp_path)


def test_jobs_of_a_snakemake_that_still_runs_are_left_alone(queue, tmp_path):
    write_program(tmp_path / "snakemake", "#!/bin/sh\necho started\nread line\n")
    pipe = subprocess.PIPE
    with subprocess.Popen([tmp_path / "snakemake"], cwd=tmp_path, stdin=pipe, stdout=pipe) as live:
        assert live.stdout.readline() == b"started\n"
        command = [sys.executable, "-m", "dualspeed.cli", "end-jobs"]
        done = subprocess.run(
            command, cwd=tmp_path, env={"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True
        )
        live.communicate(b"\n")
    assert done.returncode == 1
    assert done.stderr == (
        f"dualspeed end-jobs: snakemake still runs in {tmp_path} (process {live.pid}), so its jobs are not orphaned\n"
    )
    assert "7 run-a" in queue.read_text()
