"""Training in several processes: their start, their training, and the end of all when one of them dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from dualspeed.cluster.launch import accelerate_command, must_launch
from dualspeed.errors import ConfigError
from dualspeed.settings.project import load_project
from dualspeed.settings.resources import JobResources
from tests.support.paths import REPOSITORY
from tests.support.workflow import MILD, edit_cell, edit_config, finetune_recipe, plan, shrunk_project, snakemake

TARGET = f"results/models/{MILD}"


def set_resources(project: Path, **values: object) -> None:
    file = project / "config/demo/config.yaml"
    config = yaml.safe_load(file.read_text())
    config["models"]["tiny"]["resources"] = {"finetune": values}
    file.write_text(yaml.safe_dump(config, sort_keys=False))


def test_null_means_one_process_for_each_gpu():
    assert JobResources(gpu=8).resolved(use_cpu=False).processes == 8
    assert JobResources().resolved(use_cpu=False).gpu == 1
    on_cpu = JobResources().resolved(use_cpu=True)
    assert (on_cpu.gpu, on_cpu.processes) == (0, 1)


def test_several_nodes_have_one_task_each_and_their_gpus_evenly():
    asked = JobResources(nodes=2, gpu=4, partition="long").resolved(use_cpu=False).asked()
    assert (asked["nodes"], asked["tasks"], asked["gpu"]) == (2, 2, 8)
    assert asked["slurm_extra"] == "--ntasks-per-node=1 --gpus-per-node=4"
    assert asked["slurm_partition"] == "long"
    assert "slurm_account" not in asked
    assert "mpi" not in JobResources().resolved(use_cpu=False).asked()


def test_a_process_that_was_launched_launches_nothing(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert must_launch(nodes=1, processes=2, accelerate_config=None)
    assert must_launch(nodes=1, processes=1, accelerate_config="config/accelerate/fsdp2.yaml")
    assert not must_launch(nodes=1, processes=1, accelerate_config=None)
    monkeypatch.setenv("RANK", "0")
    assert not must_launch(nodes=1, processes=2, accelerate_config=None)


def test_a_process_that_ended_well_does_not_abort_at_its_end(tmp_path):
    assert statuses_of_two(tmp_path / "as-commands-end") == [0, 0]
    # Python's own end fails, or ours would show nothing.
    assert statuses_of_two(tmp_path / "as-python-ends", "--plain")[0] == -signal.SIGABRT


def statuses_of_two(file: Path, *options: str) -> list[int]:
    """Exit statuses of two processes, of which a thread still waits for Python's lock when the first one ends."""
    command = [sys.executable, "-m", "tests.support.ending_worker", str(file), *options]
    processes = [
        subprocess.Popen(command, cwd=REPOSITORY, env=os.environ | {"RANK": str(rank)}, stderr=subprocess.DEVNULL)
        for rank in range(2)
    ]
    return [process.wait(60) for process in processes]


def test_resources_set_the_number_of_processes_whatever_the_file_says():
    command = accelerate_command(nodes=1, processes=4, accelerate_config="config/accelerate/fsdp2.yaml")
    assert "--num_processes=4" in command
    assert "--multi_gpu" not in command


def test_processes_that_do_not_divide_the_batch_are_an_error_before_anything_runs(tmp_path, monkeypatch):
    project = shrunk_project(tmp_path)
    set_resources(project, processes=3)
    monkeypatch.chdir(project)
    with pytest.raises(ConfigError, match=r"stages.finetune.global_batch_size.*a multiple of 3 devices"):
        load_project(project / "config/demo/config.yaml")


def test_other_resources_run_nothing_again_and_reach_the_job(tmp_path):
    project = shrunk_project(tmp_path)
    before = plan(project, TARGET)
    set_resources(project, gpu=2, nodes=2, cpus=4, runtime=77, mem_mb=1234)
    assert plan(project, TARGET) == before
    output = snakemake(project, "-n", "--printshellcmds", TARGET)
    assert "--time-limit 77 --gpus 4 --nodes 2 --processes 2 --cpus 4" in output


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    """Project that the workflow has run in, with two processes for its finetuning."""
    project = shrunk_project(tmp_path_factory.mktemp("two"))
    set_resources(project, processes=2, cpus=2)
    output = snakemake(project, "--cores", "2", TARGET)
    assert (project / TARGET / "model.safetensors").exists(), output[-5000:]
    return project


@pytest.mark.slow
def test_two_processes_train_through_the_workflow(two_processes):
    log = (two_processes / f"results/logs/finetune/{MILD}.log").read_text()
    assert "in 2 processes" in log
    assert plan(two_processes, TARGET) == set()


@pytest.mark.slow
def test_a_killed_process_ends_the_job_and_its_log_is_named(two_processes):
    edit_cell("distillation_weight", "0.5")(two_processes)  # trains anew
    edit_config(lambda content: finetune_recipe(content)["training_arguments"].update(max_steps=4000))(two_processes)
    log = f"results/logs/finetune/{MILD}.log"
    (two_processes / log).unlink()
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--", TARGET]
    run = subprocess.Popen(command, cwd=two_processes, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not (second := process_of_rank(1, two_processes)) or "'loss'" not in (two_processes / log).read_text():
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.2)
    os.kill(second, signal.SIGKILL)
    output = run.communicate(timeout=110)[0]
    assert run.returncode == 1
    assert f"{log} (check log file(s) for error details)" in output
    assert "Signal 9 (SIGKILL) received" in (two_processes / log).read_text()
    assert process_of_rank(0, two_processes) is None


def process_of_rank(rank: int, project: Path) -> int | None:
    """Id of the process that trains as this rank in a project's folder; None if there is none."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = (process / "environ").read_bytes().split(b"\0")
            if f"RANK={rank}".encode() in variables and Path(os.readlink(process / "cwd")) == project.resolve():
                return int(process.name)
        except OSError:
            continue
    return None
