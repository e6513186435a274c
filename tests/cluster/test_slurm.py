"""The demo's workflow, shrunk, on a real Slurm, with every interruption: nothing is lost or done twice.

One finetuning is cancelled (scancel) and requeued, another is killed and runs out of time, and the snakemake of both
is killed; then comes `make resume`. The results are compared with an uninterrupted run of profiles/default.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support.slurm_cluster import slurm, wait_for
from tests.support.slurm_projects import (
    BIN,
    MILD,
    NUM_STEPS,
    OPTIONS,
    ROWS,
    STRONG,
    edit_config,
    edit_row,
    live_trainer,
    make_project,
    snakemake,
    state_of,
    steps_of,
)

pytestmark = pytest.mark.slurm

RESOURCES = {
    "pretrain": {"gpu": 1, "mem_mb": 3000},
    "finetune": {"gpu": 1, "mem_mb": 3000, "runtime": 1},
    "answer": {"gpu": 1, "mem_mb": 3000},
    "speed": {"gpu": 0, "mem_mb": 3000},
}


class Monitor(threading.Thread):
    """Thread that watches the queue: rules of running jobs, and the most GPUs allocated at once."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most_gpus, self.rules, self.done = 0, set(), threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.5):
            lines = slurm("squeue", "--noheader", "--states=R", "-O", "tres-per-job:30,comment:100").splitlines()
            self.most_gpus = max(self.most_gpus, sum("gpu" in line[:30] for line in lines))
            self.rules |= {line[30:].strip().partition("_wildcards_")[0] for line in lines}


def job_of(row: str) -> str | None:
    """Id of the running Slurm job that finetunes a row; None if there is none."""
    for line in slurm("squeue", "--noheader", "--states=R", "--format=%A %k").splitlines():
        job, _, comment = line.partition(" ")
        if comment == f"rule_finetune_wildcards_{row}":
            return job
    return None


def paused_trainer(project: Path, row: str, before: int | None = None) -> int:
    """Wait for a process other than `before` that trains a row, and pause it after some steps; returns its id."""

    def found():
        process = live_trainer(project, row)
        return process if process != before else None

    process = wait_for(found, 600, "new training")
    done = len(steps_of(project, row))
    wait_for(lambda: len(steps_of(project, row)) >= done + 10, 120, "more steps")
    os.kill(process, signal.SIGSTOP)
    return process


def is_gone(process: int) -> bool:
    return not Path(f"/proc/{process}").exists()


def start(project: Path, *targets: str) -> subprocess.Popen:
    """Start a snakemake with profiles/slurm in the background."""
    with (project / "snakemake.log").open("a") as log:
        command = [BIN / "snakemake", "--profile", "profiles/slurm", *OPTIONS, "--", *targets]
        return subprocess.Popen(command, cwd=project, stdout=log, stderr=log)


def interrupt(project: Path, events: dict[str, object]) -> None:
    """Interrupt the two finetunings in every way while their snakemake lives; notes in `events` what is seen."""
    mild, strong = paused_trainer(project, MILD), paused_trainer(project, STRONG)
    slurm("scancel", job_of(MILD))  # Slurm continues a paused process so that it gets SIGTERM
    os.kill(strong, signal.SIGKILL)
    wait_for(lambda: is_gone(mild), 60, "end after scancel")
    events["after_scancel"] = [path.name for path in (state_of(project, MILD) / "checkpoints").iterdir()]

    mild, strong = paused_trainer(project, MILD, mild), paused_trainer(project, STRONG, strong)
    began = time.monotonic()
    events["requeued"] = job_of(MILD)
    slurm("scontrol", "requeue", job_of(MILD))
    # Meanwhile the command of the live job runs a second time, as if it had been submitted twice.
    again = [word for word in Path(f"/proc/{strong}/cmdline").read_bytes().decode().split("\0") if word]
    double = subprocess.run(again, cwd=project, capture_output=True, text=True, timeout=300)
    events["double_submission"] = (double.returncode, double.stderr.strip().splitlines()[-1])
    time.sleep(max(0.0, began + 31 - time.monotonic()))  # a job of one minute trains for half of it
    os.kill(strong, signal.SIGCONT)
    wait_for(lambda: is_gone(strong), 60, "end by the time limit")
    events["out_of_time"] = (project / f"results/logs/finetune/{STRONG}.log").read_text().strip().splitlines()[-1]

    paused_trainer(project, MILD, mild)
    events["after_requeue"] = job_of(MILD)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Project with its data prepared and its base model made."""
    project = make_project(tmp_path_factory.mktemp("prepared"), RESOURCES)
    output = snakemake(project, *(f"results/prepared/tiny/{stage}" for stage in ("pretrain", "finetune")))
    assert (project / "results/prepared/tiny/finetune").exists(), output[-5000:]
    return project


@pytest.fixture(scope="module")
def disturbed(cluster, prepared, tmp_path_factory) -> tuple[Path, Monitor, dict[str, object]]:
    """Project whose rows ran on Slurm with interruptions, the queue's monitor, and the noted events."""
    project = shutil.copytree(prepared, tmp_path_factory.mktemp("disturbed") / "project")
    monitor, events = Monitor(), {}
    monitor.start()
    run = start(project)
    try:
        interrupt(project, events)
    finally:
        run.kill()
        run.wait()
    events["left_over"] = job_of(MILD)
    options = [*OPTIONS, "--set-resources", "finetune:runtime=20"]
    command = ["make", "resume", f"BIN={BIN}", f"ARGS={' '.join(options)}"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=900)
    events["resumed"] = (done.returncode, done.stdout + done.stderr)
    monitor.done.set()
    return project, monitor, events


@pytest.fixture(scope="module")
def undisturbed(prepared) -> Path:
    """Project whose rows ran on this machine without Slurm or interruptions."""
    output = snakemake(prepared, "--set-resources", "finetune:runtime=60")
    assert (prepared / "results/tables/demo/table1.csv").exists(), output[-5000:]
    return prepared


def test_all_jobs_ran_on_slurm_and_no_more_of_them_than_gpus(disturbed):
    _, monitor, events = disturbed
    assert events["resumed"][0] == 0, events["resumed"][1][-5000:]
    assert {
        "rule_pretrain",
        "rule_finetune",
        "rule_measure_speed",
        "rule_generate_answers",
        "rule_score",
    } <= monitor.rules
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
    assert disturbed[2]["after_requeue"] == disturbed[2]["requeued"]


def test_training_ends_before_its_time_does(disturbed):
    assert "its time is nearly over" in disturbed[2]["out_of_time"]


def test_resume_ends_what_a_killed_snakemake_left_over(disturbed):
    output = disturbed[2]["resumed"][1]
    ended = next(line for line in output.splitlines() if "Slurm jobs that were left over" in line)
    assert disturbed[2]["left_over"] in ended.split()


def test_two_nodes_train_one_model_by_the_settings_of_their_dag(disturbed, tmp_path):
    """The sheet is edited while the job waits in the queue; the job keeps the settings that it was submitted with."""
    project = shutil.copytree(disturbed[0], tmp_path / "project")

    def use_two_nodes(config: dict) -> None:
        config["models"]["tiny"]["resources"]["finetune"] = {"nodes": 2, "gpu": 1, "mem_mb": 3000, "runtime": 5}
        config["models"]["tiny"]["stages"]["finetune"]["training_arguments"]["max_steps"] = 6

    edit_config(project, use_two_nodes)
    target = f"results/models/{STRONG}"
    slurm("scontrol", "update", "nodename=ALL", "state=drain", "reason=test")
    try:
        run = start(project, target)
        queued = ["squeue", "--noheader", "--states=PD", "--format=%k"]
        wait_for(lambda: slurm(*queued) == f"rule_finetune_wildcards_{STRONG}", 200, "job in the queue")
        edit_row(project, STRONG, distillation_weight="0.5")
    finally:
        slurm("scontrol", "update", "nodename=ALL", "state=resume")
    try:
        assert run.wait(300) == 0, (project / "snakemake.log").read_text()[-5000:]
    finally:
        run.kill()

    log = (project / f"results/logs/finetune/{STRONG}.log").read_text()
    for node in range(2):
        assert re.search(rf"^{node}: .*in 2 processes", log, flags=re.MULTILINE), log[-5000:]
    record = json.loads((project / target / "training.json").read_text())
    assert record["num_steps"] == 6
    assert record["settings"]["dualspeed"]["distillation_weight"] == 1.0
    assert f"Finetune {STRONG}" in snakemake(project, "-n", target)  # what the edit asks for
