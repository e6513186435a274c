"""Eight jobs log at once while the server fails in various ways; no point is lost or doubled."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.support.servers import mlflow_server, postgres

NUM_JOBS, NUM_STEPS = 8, 250
METRICS = ("loss", "ce_loss", "learning_rate", "tokens_per_second")  # times the steps: 1,000 points a job
START_MS = 1_700_000_000_000

JOB = """
import logging, sys, time
from pathlib import Path
from mlflow import MlflowClient
from dualspeed.tracking import metric_log
from dualspeed.tracking.delivery import ParentRun
from dualspeed.tracking.metric_log import MetricLog, RunSpec
from dualspeed.tracking.store import Store

logging.basicConfig(level=logging.WARNING)
number, folder, uri, experiment, num_steps, pause, start_ms, *metrics = sys.argv[1:]
metric_log.DELIVERY_SECONDS = metric_log.RETRY_SECONDS = 0.5
Path(folder).mkdir(parents=True)
while not (Path(folder).parent / "go").exists():
    time.sleep(0.05)
spec = RunSpec(f"finetune {number}", ParentRun(f"row {int(number) % 2}", "abc"), {"seed": int(number)})
with MetricLog(Path(folder), Store(uri, experiment), spec) as log:
    for step in range(int(num_steps)):
        values = {name: int(number) + step / 7 + index for index, name in enumerate(metrics)}
        log.log(step, values, int(start_ms) + 10 * step)
        time.sleep(float(pause))
"""


def start_jobs(state: Path, tracking: dict[str, str], pause: float, num_jobs: int = NUM_JOBS) -> list[subprocess.Popen]:
    """Start processes that log NUM_STEPS steps of METRICS at once, each to its folder, with `pause` seconds a step."""
    jobs = []
    for number in range(num_jobs):
        arguments = [number, state / f"job{number}", tracking["uri"], tracking["experiment"], NUM_STEPS, pause]
        command = [sys.executable, "-c", JOB, *map(str, arguments), str(START_MS), *METRICS]
        jobs.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    while len(list(state.glob("job*"))) < num_jobs:
        assert all(job.poll() is None for job in jobs)
        time.sleep(0.1)
    (state / "go").touch()
    return jobs


def wait_for_points(state: Path, num_jobs: int = NUM_JOBS, seconds: float = 60) -> None:
    """Wait until each job has delivered some of its points; the caller makes sure that it can't have delivered all."""
    deadline = time.monotonic() + seconds
    while len([run for run in state.glob("*/run.json") if json.loads(run.read_text())["bytes"]]) < num_jobs:
        assert time.monotonic() < deadline, "the jobs deliver nothing"
        time.sleep(0.1)


def finish(jobs: list[subprocess.Popen]) -> list[list[str]]:
    """Wait for the jobs, which must succeed; returns the warnings of each."""
    warnings = [job.communicate(timeout=180)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0] * len(jobs), warnings
    return [[line for line in text.splitlines() if "took nothing" in line] for text in warnings]


def sync(state: Path, tracking: dict[str, str]) -> subprocess.CompletedProcess:
    """Run `dualspeed track sync`."""
    command = [sys.executable, "-m", "dualspeed.cli", "track", "sync", "--tracking", json.dumps(tracking)]
    return subprocess.run([*command, "--state", str(state)], capture_output=True, text=True, timeout=180)


def check_store(tracking: dict[str, str], num_jobs: int = NUM_JOBS) -> None:
    """Assert that the store has each point once with its own time, one run a job and one parent a row."""
    client = MlflowClient(tracking["uri"])
    experiment = client.get_experiment_by_name(tracking["experiment"]).experiment_id
    runs = client.search_runs([experiment], max_results=1000)
    stages = {run.info.run_name: run for run in runs if run.data.tags["kind"] == "stage"}
    parents = {run.info.run_id: run.data.tags["row"] for run in runs if run.data.tags["kind"] == "experiment"}
    assert len(runs) == num_jobs + min(num_jobs, 2) and len(stages) == num_jobs
    for number in range(num_jobs):
        run = stages[f"finetune {number}"]
        assert run.info.status == "FINISHED" and run.data.params == {"seed": str(number)}
        assert parents[run.data.tags["mlflow.parentRunId"]] == f"row {number % 2}"
        for index, name in enumerate(METRICS):
            points = [(one.step, one.value, one.timestamp) for one in client.get_metric_history(run.info.run_id, name)]
            expected = [(step, number + step / 7 + index, START_MS + 10 * step) for step in range(NUM_STEPS)]
            assert sorted(points) == expected


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def server(request, tmp_path_factory):
    """Tracking server on each kind of database; `server.postgres` is the PostgreSQL, if any."""
    folder = tmp_path_factory.mktemp(f"server-{request.param}")
    if request.param == "sqlite":
        with mlflow_server(f"sqlite:///{folder}/mlflow.db", folder) as server:
            yield server
    else:
        with postgres() as database, mlflow_server(database.uri, folder) as server:
            server.postgres = database
            yield server


@pytest.mark.slow
def test_eight_jobs_at_once_lose_nothing_on_the_embedded_sqlite(tmp_path):
    tracking = {"uri": f"sqlite:///{tmp_path}/mlflow.db", "experiment": "eight"}
    finish(start_jobs(tmp_path / "state", tracking, pause=0.01))  # they make the database, too
    assert sync(tmp_path / "state", tracking).returncode == 0  # delivers the rest, if the machine was too busy
    check_store(tracking)
    assert sync(tmp_path / "state", tracking).stdout.startswith("0 metrics were missing")


@pytest.mark.slow
def test_eight_jobs_lose_nothing_when_the_server_is_killed_and_restarted(tmp_path, server):
    tracking = {"uri": server.uri, "experiment": "killed"}
    jobs = start_jobs(tmp_path / "state", tracking, pause=0.04)
    wait_for_points(tmp_path / "state")
    server.kill()
    warnings = finish(jobs)  # none waits for the server
    assert all(len(lines) == 1 for lines in warnings)
    away = sync(tmp_path / "state", tracking)
    assert away.returncode == 1 and "Nothing is lost" in away.stderr and "Traceback" not in away.stderr
    server.start()
    assert sync(tmp_path / "state", tracking).returncode == 0
    check_store(tracking)
    assert sync(tmp_path / "state", tracking).stdout.startswith("0 metrics were missing")
    for run in (tmp_path / "state").glob("*/run.json"):
        run.unlink()  # the record of what was sent is lost: all is sent again, and absorbed
    assert sync(tmp_path / "state", tracking).stdout.startswith(f"{NUM_JOBS * NUM_STEPS * len(METRICS)} metrics")
    check_store(tracking)


@pytest.mark.slow
def test_server_that_hangs_in_the_middle_costs_a_warning(tmp_path, server):
    tracking = {"uri": server.uri, "experiment": "hung"}
    jobs = start_jobs(tmp_path / "state", tracking, pause=0.04, num_jobs=2)
    wait_for_points(tmp_path / "state", num_jobs=2)
    server.signal(signal.SIGSTOP)
    try:
        assert all(len(lines) == 1 for lines in finish(jobs))  # they end while it still hangs
    finally:
        server.signal(signal.SIGCONT)
    assert sync(tmp_path / "state", tracking).returncode == 0
    check_store(tracking, num_jobs=2)


@pytest.mark.slow
def test_server_that_is_down_at_the_start_is_used_once_it_is_there(tmp_path, server):
    tracking = {"uri": server.uri, "experiment": "late"}
    server.kill()
    command = [sys.executable, "-m", "dualspeed.cli", "track", "init", "--tracking", json.dumps(tracking)]
    init = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert init.returncode == 0 and "took nothing" in init.stderr
    jobs = start_jobs(tmp_path / "state", tracking, pause=0.1, num_jobs=2)
    server.start()
    assert all(len(lines) == 1 for lines in finish(jobs))
    # On a busy machine the server may be up too late for the jobs to deliver everything; sync delivers the rest.
    assert sync(tmp_path / "state", tracking).returncode == 0
    check_store(tracking, num_jobs=2)
    assert sync(tmp_path / "state", tracking).stdout.startswith("0 metrics were missing")


@pytest.mark.slow
def test_server_that_answers_500_because_its_database_died_costs_a_warning(tmp_path, server):
    if server.database.startswith("sqlite"):
        pytest.skip("a file does not die")
    tracking = {"uri": server.uri, "experiment": "500"}
    jobs = start_jobs(tmp_path / "state", tracking, pause=0.04, num_jobs=2)
    wait_for_points(tmp_path / "state", num_jobs=2)
    server.postgres.stop()
    try:
        assert all(len(lines) == 1 for lines in finish(jobs))
        assert re.search(r'HTTP/1.1" 5\d\d ', (server.folder / "server.log").read_text())
    finally:
        server.postgres.start()
    assert sync(tmp_path / "state", tracking).returncode == 0
    check_store(tracking, num_jobs=2)
