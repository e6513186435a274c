"""A store that people and programs changed: deleted, renamed, of other versions, shared."""

import json
import sqlite3
import subprocess
import sys
import time

import pytest
from mlflow import MlflowClient
from mlflow.entities import ViewType
from mlflow.exceptions import MlflowException

from dualspeed.reporting.mlflow_runs import log_results, sync
from dualspeed.reporting.tables import write_tables
from dualspeed.tracking import metric_log
from dualspeed.tracking.delivery import ParentRun, sync_state
from dualspeed.tracking.metric_log import MetricLog, RunSpec
from dualspeed.tracking.store import Store, find_runs, open_store, project_id, warn_undelivered
from tests.support.results_tree import make_tree

SPEC = RunSpec("finetune", ParentRun("row", "abc"), params={"seed": 0})


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def store(database, request):
    open_store.cache_clear()  # as in a new process
    return Store(database, request.node.name)


@pytest.fixture
def client(database):
    return MlflowClient(database)


def log_stage(folder, store, step, value=1.0):
    with MetricLog(folder, store, SPEC) as log:
        log.log(step, {"loss": value}, 1000 + step)


def runs_of(client, store, view=ViewType.ACTIVE_ONLY, **tags):
    experiment = client.get_experiment_by_name(store.experiment)
    condition = " and ".join(f"tags.{key} = '{value}'" for key, value in tags.items())
    return list(client.search_runs([experiment.experiment_id], condition, view))


def steps_of(client, run):
    return sorted(point.step for point in client.get_metric_history(run.info.run_id, "loss"))


def track(action, store, *arguments):
    """`dualspeed track`, as the workflow calls it."""
    tracking = json.dumps({"uri": store.uri, "experiment": store.experiment})
    command = [sys.executable, "-m", "dualspeed.cli", "track", action, "--tracking", tracking, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_track_init_restores_a_deleted_experiment_and_says_so(tmp_path, store, client):
    log_stage(tmp_path / "a", store, 1)
    experiment = client.get_experiment_by_name(store.experiment).experiment_id
    client.delete_experiment(experiment)
    done = track("init", store, "--state", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (
        f"the MLflow experiment '{store.experiment}' was deleted there; it is restored, with all of its runs"
        in done.stderr
    )
    assert client.get_experiment(experiment).lifecycle_stage == "active"
    log_stage(tmp_path / "a", store, 2)
    (run,) = runs_of(client, store, kind="stage")
    assert steps_of(client, run) == [1, 2]


def test_a_job_restores_an_experiment_that_is_deleted_while_it_runs(tmp_path, store, client, monkeypatch):
    monkeypatch.setattr(metric_log, "DELIVERY_SECONDS", 0.1)
    monkeypatch.setattr(metric_log, "RETRY_SECONDS", 0.1)
    log_stage(tmp_path / "a", store, 1)  # opens the store in this process
    experiment = client.get_experiment_by_name(store.experiment).experiment_id
    client.delete_experiment(experiment)
    with MetricLog(tmp_path / "b", store, RunSpec("other")) as log:
        log.log(1, {"loss": 1.0})
        deadline = time.monotonic() + 300
        while client.get_experiment(experiment).lifecycle_stage == "deleted":
            assert time.monotonic() < deadline, "the job restores nothing"
    assert client.get_experiment(experiment).lifecycle_stage == "active"
    sync_state(tmp_path, store)
    assert {run.data.tags["state"] for run in runs_of(client, store, kind="stage")} == {"a", "b"}


def test_a_renamed_experiment_is_named_when_a_new_one_is_made(tmp_path, store, client, caplog):
    log_stage(tmp_path / "a", store, 1)
    experiment = client.get_experiment_by_name(store.experiment).experiment_id
    client.rename_experiment(experiment, f"{store.experiment} of May")
    open_store.cache_clear()
    metric_log.init(store)
    assert f"'{store.experiment}' was renamed to '{store.experiment} of May'; a new one is made" in caplog.text
    renamed = Store(store.uri, f"{store.experiment} of May")
    log_stage(tmp_path / "a", renamed, 2)
    (run,) = runs_of(client, renamed, kind="stage")
    assert steps_of(client, run) == [1, 2]


def test_a_renamed_run_goes_on_under_its_new_name(tmp_path, store, client):
    log_stage(tmp_path / "a", store, 1)
    for run in runs_of(client, store):
        client.update_run(run.info.run_id, name="my favourite")
    (tmp_path / "a" / "run.json").unlink()  # found by its tags, not by its name
    log_stage(tmp_path / "a", store, 2)
    runs = runs_of(client, store)
    assert len(runs) == 2 and {run.info.run_name for run in runs} == {"my favourite"}
    (stage,) = runs_of(client, store, kind="stage")
    assert steps_of(client, stage) == [1, 2]


def test_a_deleted_run_stays_deleted_even_where_its_id_is_forgotten(tmp_path, store, client):
    log_stage(tmp_path / "a", store, 1)
    for run in runs_of(client, store):  # the row's too
        client.delete_run(run.info.run_id)
    (tmp_path / "a" / "run.json").unlink()
    log_stage(tmp_path / "a", store, 2)
    assert sync_state(tmp_path, store) == 0
    assert runs_of(client, store) == []
    assert len(runs_of(client, store, ViewType.ALL)) == 2


def test_a_deleted_row_costs_the_other_rows_nothing(tmp_path, store, client):
    sheet = make_tree(tmp_path / "results")
    write_tables(sheet, tmp_path / "tables")
    (tmp_path / "figures").mkdir()
    folders = tmp_path / "tables", tmp_path / "figures"
    log_results(sheet, store, *folders)
    rows = {run.data.tags["row"]: run for run in runs_of(client, store, kind="experiment")}
    assert set(rows) == {"ds-0", "ds-1", "naive-0", "base-0", "base-1"}
    client.delete_run(rows["ds-0"].info.run_id)
    children = {"kind": "score", "mlflow.parentRunId": rows["ds-1"].info.run_id}
    scores = {run.data.tags["benchmark"]: run for run in find_runs(open_store(store), children)}
    score = scores["gqa"]
    client.delete_run(score.info.run_id)
    (tables,) = runs_of(client, store, kind="sheet")
    client.delete_run(tables.info.run_id)
    sync(tmp_path / "results/state", store)
    assert {run.data.tags["row"] for run in runs_of(client, store, kind="experiment")} == set(rows) - {"ds-0"}
    assert runs_of(client, store, kind="sheet") == []
    assert [run.data.tags["benchmark"] for run in find_runs(open_store(store), children)] == ["scienceqa"]


def test_two_projects_of_one_experiment_keep_their_runs(tmp_path, store, client):
    """Equal rows, settings and states, as in two clones: elsewhere each would take the other's runs for its own."""
    for project, value in (("one", 1.0), ("two", 2.0)):
        log_stage(tmp_path / project / "a", store, 1, value)
    for project, value in (("one", 1.5), ("two", 2.5)):
        log_stage(tmp_path / project / "a", store, 2, value)
    stages, parents = runs_of(client, store, kind="stage"), runs_of(client, store, kind="experiment")
    assert len(stages) == len(parents) == 2
    histories = {}
    for run in stages:
        points = client.get_metric_history(run.info.run_id, "loss")
        histories[run.data.tags["project"]] = [point.value for point in sorted(points, key=lambda point: point.step)]
    ids = {name: project_id(tmp_path / name) for name in ("one", "two")}
    assert histories == {ids["one"]: [1.0, 1.5], ids["two"]: [2.0, 2.5]}
    assert {run.data.tags["mlflow.parentRunId"] for run in stages} == {run.info.run_id for run in parents}


def test_a_project_that_moved_goes_on_with_its_runs(tmp_path, store, client):
    log_stage(tmp_path / "here/a", store, 1)
    (tmp_path / "here").rename(tmp_path / "there")
    (tmp_path / "there/a/run.json").unlink()
    log_stage(tmp_path / "there/a", store, 2)
    (run,) = runs_of(client, store, kind="stage")
    assert steps_of(client, run) == [1, 2]


def test_a_run_of_before_projects_had_ids_is_taken(tmp_path, store, client):
    log_stage(tmp_path / "a", store, 1)
    for run in runs_of(client, store):
        client.delete_tag(run.info.run_id, "project")
    (tmp_path / "a/run.json").unlink()
    log_stage(tmp_path / "a", store, 2)
    assert len(runs_of(client, store)) == 2


@pytest.fixture
def other_version(tmp_path, store):
    """Store whose tables another version of MLflow made."""
    path = tmp_path / "mlflow.db"
    tracking = Store(f"sqlite:///{path}", "x")
    metric_log.init(tracking)
    with sqlite3.connect(path) as connection:
        connection.execute("update alembic_version set version_num = 'f0f0f0f0f0f0'")
    connection.close()
    return tracking


def test_a_store_of_another_version_is_one_sentence_that_says_what_to_do(tmp_path, other_version):
    log_stage(tmp_path / "a", None, 1)
    for action in ("init", "sync"):
        done = track(action, other_version, "--state", tmp_path)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        message = done.stderr.splitlines()[-1]
        assert (
            f"dualspeed track: MLflow at {other_version.uri}: the store is of another version of MLflow (schema f0f0"
            in message
        )
        assert f"after a backup, run `mlflow db upgrade {other_version.uri}`" in message


def test_a_job_on_such_a_store_says_the_same_in_its_warning(caplog):
    reason = "Detected out-of-date database schema (found version f0f0, but expected a1a1). Take a backup of your"
    warn_undelivered("sqlite:///x.db", MlflowException(reason))
    assert (
        "MLflow at sqlite:///x.db took nothing (the store is of another version of MLflow (schema f0f0" in caplog.text
    )


def test_a_store_that_is_no_database_is_one_sentence(tmp_path):
    (tmp_path / "mlflow.db").write_text("no database" * 100)
    done = track("init", Store(f"sqlite:///{tmp_path}/mlflow.db", "x"), "--state", tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "dualspeed track: MLflow at sqlite:///" in done.stderr.splitlines()[-1]


def test_artifacts_lie_beside_the_store_whatever_its_folder_is_called(tmp_path):
    folder = tmp_path / "a b#1 of Bob's %20 ü"
    store = open_store(Store(f"sqlite:///{folder}/mlflow.db", "x"))
    run = store.client.create_run(store.experiment_id)
    store.client.log_text(run.info.run_id, "text", "a.txt")
    assert list(folder.glob("mlartifacts/*/artifacts/a.txt"))
    assert [file.path for file in store.client.list_artifacts(run.info.run_id)] == ["a.txt"]
