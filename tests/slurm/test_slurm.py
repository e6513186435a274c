"""The demo's workflow, shrunk, on a real Slurm, through all that befalls jobs there: nothing is lost or done twice.

One run is told to end (scancel), killed, requeued, out of time, and loses its snakemake; then `make resume`. What it
leaves is compared with a run of profiles/default that nothing happened to.
"""

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from cluster import slurm, wait_for
from projects import BIN, DUALSPEED, NUM_STEPS, OPTIONS, ROWS, live_trainer, make_project, snakemake, steps_of
from safetensors.torch import load_file

pytestmark = pytest.mark.slurm

RESOURCES = {
    "pretrain": {"gpu": 1, "mem_mb": 3000},
    "finetune": {"gpu": 1, "mem_mb": 3000, "runtime": 1},
    "answer": {"gpu": 1, "mem_mb": 3000},
    "speed": {"gpu": 0, "mem_mb": 3000},
}


class Monitor(threading.Thread):
    """Watches the queue: (rule, allocated GPUs) of running jobs, and each job's exit."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most_gpus, self.rules, self.done = 0, set(), threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.5):
            lines = slurm("squeue", "--noheader", "--states=R", "-O", "tres-per-job:30,comment:100").splitlines()
            self.most_gpus = max(self.most_gpus, sum("gpu" in line[:30] for line in lines))
            self.rules |= {line[30:].strip().partition("_wildcards_")[0] for line in lines}


def job_of(row: str) -> str | None:
    """Id of the Slurm job that finetunes a row now."""
    for line in slurm("squeue", "--noheader", "--states=R", "--format=%A %k").splitlines():
        job, _, comment = line.partition(" ")
        if comment == f"rule_finetune_wildcards_{row}":
            return job
    return None


def next_trainer(project: Path, steps: int, before: int | None = None) -> tuple[int, str]:
    """Process and job that train the row now, not `before`, once so many more steps are logged."""

    def found():
        process = live_trainer(project, DUALSPEED)
        return process if process != before else None

    process = wait_for(found, 400, "new training")
    done = len(steps_of(project, DUALSPEED))
    wait_for(lambda: len(steps_of(project, DUALSPEED)) >= done + steps, 60, "more steps")
    return process, job_of(DUALSPEED)


def start(project: Path) -> subprocess.Popen:
    """A snakemake of the profile, in the background."""
    with (project / "snakemake.log").open("a") as log:
        command = [BIN / "snakemake", "--profile", "profiles/slurm", *OPTIONS]
        return subprocess.Popen(command, cwd=project, stdout=log, stderr=log)


def interrupt(project: Path, events: dict[str, object]) -> None:
    """All that happens to the run until its snakemake is killed."""
    run = start(project)
    process, job = next_trainer(project, 15)
    slurm("scancel", job)
    wait_for(lambda: not Path(f"/proc/{process}").exists(), 40, "end after scancel")
    events["after_scancel"] = sorted(path.name for path in project.glob("results/state/*/checkpoints/*"))

    process, _ = next_trainer(project, 15, process)
    os.kill(process, signal.SIGKILL)

    process, job = next_trainer(project, 15, process)
    # A second job of the same run, as if it had been submitted twice.
    cell = [line for line in (Path(f"/proc/{process}/cmdline").read_bytes().decode().split("\0")) if line]
    double = subprocess.run(cell, cwd=project, capture_output=True, text=True, timeout=120)
    events["double_submission"] = (double.returncode, double.stderr.strip().splitlines()[-1])
    slurm("scontrol", "requeue", job)

    process, events["requeued"] = next_trainer(project, 1, process)
    events["requeued_is"] = (job, events["requeued"])
    wait_for(lambda: live_trainer(project, DUALSPEED) != process, 120, "end by the time limit")

    next_trainer(project, 15, process)
    run.kill()
    run.wait()
    events["left_over"] = slurm("squeue", "--noheader", "--format=%A").split()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The same run on this machine without Slurm."""
    project = make_project(tmp_path_factory.mktemp("undisturbed"), RESOURCES)
    output = snakemake(project)
    assert (project / "results/tables/demo/table1.csv").exists(), output[-5000:]
    return project


@pytest.fixture(scope="module")
def disturbed(cluster, tmp_path_factory) -> tuple[Path, Monitor, dict[str, object]]:
    """The run on Slurm, what was seen of it, and what happened to it."""
    project = make_project(tmp_path_factory.mktemp("disturbed"), RESOURCES)
    monitor, events = Monitor(), {}
    monitor.start()
    interrupt(project, events)
    command = ["make", "resume", f"BIN={BIN}", f"ARGS={' '.join(OPTIONS)}"]
    began = time.monotonic()
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=400)
    events["resumed"] = (done.returncode, done.stdout + done.stderr, time.monotonic() - began)
    monitor.done.set()
    return project, monitor, events


def test_all_jobs_ran_on_slurm_and_no_more_of_them_than_gpus(disturbed):
    _, monitor, events = disturbed
    assert events["resumed"][0] == 0, events["resumed"][1][-5000:]
    assert {"rule_pretrain", "rule_finetune", "rule_generate_answers", "rule_make_base_model"} <= monitor.rules
    assert 1 <= monitor.most_gpus <= 2


def test_interrupted_training_equals_uninterrupted_bit_for_bit(disturbed, undisturbed):
    project = disturbed[0]
    for row in ROWS:
        for name in ("model.safetensors", "mode_isolator.safetensors"):
            path = f"results/models/{row}/{name}"
            assert (project / path).exists() == (undisturbed / path).exists()
            if (project / path).exists():
                one, other = load_file(project / path), load_file(undisturbed / path)
                assert all(one[key].equal(other[key]) for key in other), (row, name)


def test_no_step_is_logged_twice_or_left_out(disturbed):
    for row in ROWS:
        assert steps_of(disturbed[0], row) == list(range(1, NUM_STEPS + 1))


def test_tables_are_those_of_the_local_profile(disturbed, undisturbed):
    tables = [(project / "results/tables/demo/scores.csv").read_text() for project in (disturbed[0], undisturbed)]
    assert tables[0] == tables[1]


def test_scancel_leaves_a_whole_checkpoint(disturbed):
    assert disturbed[2]["after_scancel"], "no checkpoint"
    assert all(name.startswith("checkpoint-") for name in disturbed[2]["after_scancel"])


def test_a_second_job_of_a_live_run_is_refused(disturbed):
    status, message = disturbed[2]["double_submission"]
    assert status == 1
    assert "trains this run; wait for it, or end it first" in message


def test_a_requeued_job_keeps_its_number(disturbed):
    before, after = disturbed[2]["requeued_is"]
    assert before == after


def test_resume_ends_what_a_killed_snakemake_left_over(disturbed):
    left_over, (_, output, _) = disturbed[2]["left_over"], disturbed[2]["resumed"]
    assert left_over
    assert "Slurm jobs that were left over" in output
