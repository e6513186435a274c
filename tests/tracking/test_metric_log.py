"""Metrics reach a real MLflow store once, with their own times, whatever happens to the store."""

import json
import logging
import multiprocessing
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient

from dualspeed.errors import TrackingError
from dualspeed.tracking import delivery, metric_log
from dualspeed.tracking.delivery import ParentRun, sync_state
from dualspeed.tracking.metric_log import MetricLog, RunSpec
from dualspeed.tracking.metrics_file import read_metrics
from dualspeed.tracking.store import Store, redact

ROW = ParentRun("dualspeed-p0.9", "abc123")
SPEC = RunSpec("finetune", ROW, params={"seed": 0, "recipe": {"learning_rate": 2e-5}}, tags={"stage": "finetune"})


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """URI of one SQLite store for all tests, since creating one takes seconds; each test has its own experiment."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def store(database, request):
    return Store(database, request.node.name)


def runs_of(store, **tags):
    """MLflow runs of the experiment that have these tags."""
    client = MlflowClient(tracking_uri=store.uri)
    experiment = client.get_experiment_by_name(store.experiment)
    condition = " and ".join(f"tags.{key} = '{value}'" for key, value in tags.items())
    return list(client.search_runs([experiment.experiment_id], condition))


def history(store, run, key):
    """Points of a metric in MLflow, as sorted (step, value, timestamp)."""
    points = MlflowClient(tracking_uri=store.uri).get_metric_history(run.info.run_id, key)
    return sorted((point.step, point.value, point.timestamp) for point in points)


def test_stage_is_a_child_of_its_row_with_settings_metrics_and_status(tmp_path, store):
    metric_log.init(store)
    with MetricLog(tmp_path / "state1", store, SPEC) as log:
        for step in range(3):
            log.log(step, {"loss": 2.0 - step, "ce_loss": 0.5}, timestamp_ms=1_700_000_000_000 + step)
    (parent,) = runs_of(store, kind="experiment")
    (child,) = runs_of(store, kind="stage")
    assert parent.data.tags["row"] == "dualspeed-p0.9" and parent.data.tags["settings_hash"] == "abc123"
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.info.status == "FINISHED" and child.info.run_name == "finetune"
    assert child.data.params == {"seed": "0", "recipe.learning_rate": "2e-05"}
    assert child.data.tags["stage"] == "finetune" and child.data.tags["version.mlflow"]
    assert history(store, child, "loss") == [(step, 2.0 - step, 1_700_000_000_000 + step) for step in range(3)]


def test_resumed_job_continues_its_run_and_doubles_no_step(tmp_path, store):
    with pytest.raises(RuntimeError), MetricLog(tmp_path / "state", store, SPEC) as log:
        log.log(1, {"loss": 1.0}, 1000)
        log.log(2, {"loss": 0.9}, 2000)
        raise RuntimeError
    (failed,) = runs_of(store, kind="stage")
    with MetricLog(tmp_path / "state", store, SPEC) as log:
        log.log(2, {"loss": 0.9, "accuracy": 0.5}, 9000)  # the step after the checkpoint runs a second time
        log.log(3, {"loss": 0.8}, 9500)
    (resumed,) = runs_of(store, kind="stage")
    assert failed.info.status == "FAILED" and resumed.info.status == "FINISHED"
    assert resumed.info.run_id == failed.info.run_id
    assert history(store, resumed, "loss") == [(1, 1.0, 1000), (2, 0.9, 2000), (3, 0.8, 9500)]
    assert history(store, resumed, "accuracy") == [(2, 0.5, 9000)]


def test_changed_setting_is_a_new_run_under_a_new_parent(tmp_path, store):
    for state, settings_hash in [("a", "1"), ("b", "2")]:
        MetricLog(tmp_path / state, store, RunSpec("finetune", ParentRun("row", settings_hash))).close()
    assert len({run.data.tags["mlflow.parentRunId"] for run in runs_of(store, kind="stage")}) == 2


class Broken(BaseHTTPRequestHandler):
    """HTTP server that answers 500 to every request."""

    def do_GET(self):
        self.send_error(500)

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_):
        pass


@pytest.fixture(params=["down", "answers 500"])
def away(request):
    """Store on a server that accepts nothing; its URI has a user name and a password, which no message may show."""
    if request.param == "down":
        yield Store("http://user:secret@127.0.0.1:9", "away")
        return
    with ThreadingHTTPServer(("127.0.0.1", 0), Broken) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Store(f"http://user:secret@127.0.0.1:{server.server_port}", "away")
        server.shutdown()


def test_store_away_costs_one_warning_and_sync_brings_everything_once(tmp_path, store, away, caplog, monkeypatch):
    monkeypatch.setattr(metric_log, "RETRY_SECONDS", 0.05)
    metric_log.init(away)
    assert len(caplog.records) == 1  # the workflow goes on
    caplog.clear()
    with caplog.at_level(logging.WARNING), MetricLog(tmp_path / "state", away, SPEC) as log:
        for step in range(50):
            log.log(step, {"loss": float(step)}, 1000 + step)
        time.sleep(0.5)  # several deliveries fail
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1 and redact(away.uri) in warnings[0] and "secret" not in warnings[0]
    assert "secret" not in "".join(path.read_text() for path in (tmp_path / "state").iterdir())
    assert sync_state(tmp_path, store) == 50
    assert sync_state(tmp_path, store) == 0
    (tmp_path / "state" / "run.json").unlink()  # even with the record of what was sent lost
    assert sync_state(tmp_path, store) == 50
    (run,) = runs_of(store, kind="stage")
    assert len(runs_of(store)) == 2 and run.info.status == "FINISHED"
    assert history(store, run, "loss") == [(step, float(step), 1000 + step) for step in range(50)]


def test_logging_never_waits_for_a_store_that_does_not_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(metric_log, "CLOSE_SECONDS", 0.2)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()  # takes connections, answers none
        silent = Store(f"http://127.0.0.1:{server.getsockname()[1]}", "silent")
        start = time.monotonic()
        with MetricLog(tmp_path / "state", silent, SPEC) as log:
            for step in range(200):
                log.log(step, {"loss": 1.0})
        assert time.monotonic() - start < 3
    assert len((tmp_path / "state" / "metrics.jsonl").read_text().splitlines()) == 200


WRITER = """
import sys, threading
from pathlib import Path
from dualspeed.tracking.delivery import ParentRun
from dualspeed.tracking.metric_log import MetricLog, RunSpec
from dualspeed.tracking.store import Store
folder, uri, experiment = sys.argv[1:]
with MetricLog(Path(folder), Store(uri, experiment), RunSpec("stage", ParentRun("row", "1"))) as log:
    def write(thread):
        for step in range(100):
            log.log(step, {f"metric{thread}": step / 7})
    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
"""


def test_two_processes_of_eight_threads_lose_nothing_and_share_one_parent(tmp_path, store):
    metric_log.init(store)
    command = [sys.executable, "-c", WRITER]
    arguments = [[str(tmp_path / name), store.uri, store.experiment] for name in ("a", "b")]
    jobs = [subprocess.Popen(command + one) for one in arguments]
    assert [job.wait(60) for job in jobs] == [0, 0]
    (parent,) = runs_of(store, kind="experiment")
    stages = runs_of(store, kind="stage")
    assert {run.data.tags["state"] for run in stages} == {"a", "b"}
    for run in stages:
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        for thread in range(8):
            points = [(step, value) for step, value, _ in history(store, run, f"metric{thread}")]
            assert points == [(step, step / 7) for step in range(100)]


def test_torn_last_line_is_skipped_and_the_rest_arrives(tmp_path, store):
    with MetricLog(tmp_path / "state", None, SPEC) as log:
        log.log(1, {"loss": 1.0}, 1000)
    with (tmp_path / "state" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "time": 20')
    with MetricLog(tmp_path / "state", None, SPEC) as log:
        log.log(2, {"loss": 0.5, "grad_norm": float("nan")}, 3000)
    assert sync_state(tmp_path, store) == 3
    (run,) = runs_of(store, kind="stage")
    assert history(store, run, "loss") == [(1, 1.0, 1000), (2, 0.5, 3000)]
    assert sync_state(tmp_path, store) == 0


def test_runs_missing_from_the_store_are_delivered_again(tmp_path, store):
    with MetricLog(tmp_path / "state", store, SPEC) as log:
        log.log(1, {"loss": 1.0})
    record = json.loads((tmp_path / "state" / "run.json").read_text())
    record["run_id"] = "0" * 32  # as if the database had been deleted and made anew
    (tmp_path / "state" / "run.json").write_text(json.dumps(record))
    assert sync_state(tmp_path, store) == 1
    assert len(runs_of(store, kind="stage")) == 1


def test_run_that_a_person_deleted_stays_deleted(tmp_path, store):
    with MetricLog(tmp_path / "state", store, SPEC) as log:
        log.log(1, {"loss": 1.0})
    (run,) = runs_of(store, kind="stage")
    MlflowClient(store.uri).delete_run(run.info.run_id)
    with MetricLog(tmp_path / "state", store, SPEC) as log:
        log.log(2, {"loss": 1.0})
    assert sync_state(tmp_path, store) == 0
    assert runs_of(store, kind="stage") == []
    MlflowClient(store.uri).restore_run(run.info.run_id)
    assert sync_state(tmp_path, store) == 1
    assert [point[0] for point in history(store, run, "loss")] == [1, 2]


def test_twin_that_a_hung_server_made_is_dropped_for_the_run_with_content(tmp_path, store):
    with MetricLog(tmp_path / "a", store, SPEC) as log:
        log.log(1, {"loss": 1.0})
    originals = {run.info.run_id for run in runs_of(store)}
    client = MlflowClient(store.uri)
    for run in runs_of(store):  # requests that the server answers after their sender has asked again
        tags = {key: run.data.tags[key] for key in ("kind", "state", "row", "settings_hash") if key in run.data.tags}
        for start in (0, 2**42):
            client.create_run(run.info.experiment_id, start, tags)
    (tmp_path / "a" / "run.json").unlink()
    with MetricLog(tmp_path / "a", store, SPEC) as log:
        log.log(2, {"loss": 0.5})
    assert {run.info.run_id for run in runs_of(store)} == originals
    (run,) = runs_of(store, kind="stage")
    assert [point[:2] for point in history(store, run, "loss")] == [(1, 1.0), (2, 0.5)]


def test_folder_that_mlflow_refuses_does_not_keep_the_others_from_arriving(tmp_path, store):
    for name in ("a", "b", "c"):
        with MetricLog(tmp_path / name, None, SPEC) as log:
            log.log(1, {"loss (mean)": 1.0})
    spec = json.loads((tmp_path / "b" / "run_spec.json").read_text())
    (tmp_path / "b" / "run_spec.json").write_text(json.dumps(spec | {"params": {"a\nname": "that MLflow refuses"}}))
    with pytest.raises(TrackingError, match=r"1 of the folders .* the first, b: "):
        sync_state(tmp_path, store)
    runs = runs_of(store, kind="stage")
    assert {run.data.tags["state"]: run.data.metrics["loss _mean_"] for run in runs} == dict.fromkeys("abc", 1.0)


def test_points_are_read_in_parts_that_end_at_whole_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(delivery, "MAX_METRICS", 3)
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "time": 1000, "metrics": {"a": 1.0, "b": 2.0}}) + "\n" for step in range(5)]
    path.write_text("".join(lines) + '{"step": 5, "ti')
    ends = [end for _, end in delivery.read_points(path)]
    assert ends == [len(lines[0]) * count for count in (2, 4, 5)]
    rest = [points for start in (0, *ends) for points, _ in delivery.read_points(path, start)]
    assert sum(map(len, rest)) == 10 + 6 + 2  # from the start, after the first part, after the second, none after all


def test_metrics_are_read_line_by_line_past_torn_ones(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert list(read_metrics(path)) == []
    with MetricLog(tmp_path, None, SPEC) as log:
        log.log(1, {"loss": 1.0}, 1000)
    with path.open("a") as file:
        file.write('{"step": 2, "ti\n')  # torn, then ended by the next job
    torn_end = path.stat().st_size
    with MetricLog(tmp_path, None, SPEC) as log:
        log.log(2, {"loss": 0.5, "ce_loss": 0.25}, 2000)
    end = path.stat().st_size
    with path.open("a") as file:
        file.write('{"step": 3')
    lines = list(read_metrics(path))
    assert [(line.step, line.time, line.metrics) for line in lines] == [
        (1, 1000, {"loss": 1.0}),
        (2, 2000, {"loss": 0.5, "ce_loss": 0.25}),
    ]
    assert lines[-1].end == end and list(read_metrics(path, torn_end)) == lines[1:]


def test_threads_of_one_log_write_whole_lines(tmp_path):
    with MetricLog(tmp_path / "state", None, SPEC) as log:

        def write(thread):
            for step in range(200):
                log.log(step, {f"metric{thread}": 1.0, "long" * 50: 2.0})

        threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    lines = (tmp_path / "state" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 1600 and all(len(json.loads(line)["metrics"]) == 2 for line in lines)


def test_trainer_callback_forwards_numbers_with_their_step(tmp_path):
    from transformers import TrainerControl, TrainerState

    from dualspeed.training.callbacks import MetricLogCallback

    state = TrainerState(global_step=7, is_world_process_zero=True)
    with MetricLog(tmp_path / "state", None, SPEC) as log:
        callback = MetricLogCallback(log)
        callback.on_log(None, state, TrainerControl(), logs={"loss": 1.5, "epoch": 1, "mode": "fast", "done": True})
        state.is_world_process_zero = False
        callback.on_log(None, state, TrainerControl(), logs={"loss": 9.0})
    (line,) = (tmp_path / "state" / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["step"] == 7 and record["metrics"] == {"loss": 1.5, "epoch": 1.0}


def test_importing_tracking_loads_neither_mlflow_nor_torch():
    code = "import sys, dualspeed.tracking.metric_log; print(sorted({'mlflow', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_redact_hides_the_password_and_leaves_other_uris_alone():
    assert redact("https://me:pw@host:5000/x") == "https://host:5000/x"
    assert redact("sqlite:///results/mlflow.db") == "sqlite:///results/mlflow.db"
    assert Path(redact("sqlite:////tmp/a.db")).name == "a.db"


def test_a_fork_waits_for_a_delivery(tmp_path, monkeypatch):
    """A data loading worker that is forked during a delivery would wait forever for the locks that it inherits."""
    held, is_delivering = threading.Lock(), threading.Event()

    def slow_delivery(*_):
        with held:
            is_delivering.set()
            time.sleep(0.5)

    monkeypatch.setattr("dualspeed.tracking.metric_log.deliver", slow_delivery)
    target = Store(f"sqlite:///{tmp_path}/mlflow.db", "forks")
    with MetricLog(tmp_path / "state", target, RunSpec(name="finetune")):
        assert is_delivering.wait(10)
        worker = multiprocessing.get_context("fork").Process(target=held.acquire, daemon=True)
        worker.start()
        worker.join(10)
        assert worker.exitcode == 0
