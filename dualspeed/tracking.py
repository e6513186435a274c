"""Metrics, written to a local file first and to MLflow second, so that training never waits for a store.

A stage's state folder holds `metrics.jsonl` (one line a step: {"step", "time" in ms, "metrics"}), `run_spec.json` (what
the run is called and set to) and `run.json` (its MLflow run, and how far the lines have been delivered). A thread
delivers while the job runs; what it could not deliver, `sync` brings later with the original timestamps. MLflow's
metric key (key, timestamp, step, run, value) absorbs what arrives twice. MLflow is imported only by what talks to it.
"""

import functools
import json
import logging
import os
import subprocess
import threading
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

from dualspeed.files import write_json

METRICS_FILE, SPEC_FILE, RUN_FILE = "metrics.jsonl", "run_spec.json", "run.json"
DELIVERY_SECONDS = 5.0
RETRY_SECONDS = 60.0
CLOSE_SECONDS = 30.0
LOCK_SECONDS = 30.0
MAX_METRICS, MAX_PARAMS, MAX_PARAM_LENGTH = 1000, 100, 6000  # what MLflow takes in one call, and in one value
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "mlflow", "snakemake", "numpy", "pandas")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ParentRun:
    """The run of an experiment's row: one for each (row, hash of its settings), however often its jobs run."""

    row: str
    settings_hash: str


@dataclass(frozen=True)
class RunSpec:
    """What a stage's run is: its name, the row it belongs to (None where rows share it), settings and tags."""

    name: str
    parent: ParentRun | None = None
    params: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


class Store(NamedTuple):
    """An open MLflow store: its client and the experiment that everything goes to."""

    client: Any
    experiment_id: str


class MetricLog:
    """Metrics of one stage, kept in its state folder and delivered to MLflow by a thread.

    `tracking` is {"uri", "experiment"}, or None for the local file alone. A resumed job continues its run: a metric
    that an earlier job of this folder wrote for a step is not written again. Usable as a context manager, which ends
    the run as FAILED on an exception. Safe for threads.
    """

    def __init__(self, folder: Path, tracking: dict[str, str] | None, run: RunSpec) -> None:
        self.folder, self.tracking = Path(folder), tracking
        self.folder.mkdir(parents=True, exist_ok=True)
        self._spec = _write_spec(self.folder, run)
        self._lock, self._closing, self._warned = threading.Lock(), threading.Event(), False
        path = self.folder / METRICS_FILE
        self._written = _end_torn_line(path)
        self._file = path.open("ab")
        self._thread = threading.Thread(target=self._deliver_until_closed, name="mlflow-delivery", daemon=True)
        if tracking:
            self._thread.start()

    def log(self, step: int, metrics: dict[str, float], timestamp_ms: int | None = None) -> None:
        """Write `metrics` of `step`; the time is now unless given, in milliseconds since 1970."""
        new = {key: float(value) for key, value in metrics.items() if (key, step) not in self._written}
        if not new:
            return
        line = json.dumps({"step": step, "time": timestamp_ms or now_ms(), "metrics": new})
        with self._lock:
            self._file.write(line.encode() + b"\n")
            self._file.flush()

    def close(self, status: str = "FINISHED") -> None:
        """End the run with an MLflow status, after a last delivery that is given up after CLOSE_SECONDS."""
        if self._closing.is_set():
            return
        self._file.close()
        write_json(self.folder / SPEC_FILE, self._spec | {"status": status, "ended": now_ms()})
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)

    def sync(self) -> int:
        """Deliver now what MLflow lacks; returns the number of metrics sent, raises where the store is away."""
        return deliver(self.folder, self.tracking) if self.tracking else 0

    def __enter__(self) -> "MetricLog":
        return self

    def __exit__(self, error_type: type | None, *_: object) -> None:
        self.close("FINISHED" if error_type is None else "FAILED")

    def _deliver_until_closed(self) -> None:
        wait = 0.0
        is_last = False
        while not is_last:
            is_last = self._closing.wait(wait)
            try:
                deliver(self.folder, self.tracking)
                wait = DELIVERY_SECONDS
            except Exception as error:  # whatever MLflow raises, training goes on
                wait = RETRY_SECONDS
                if not self._warned:
                    warn_undelivered(self.tracking["uri"], error)
                self._warned = True


def init(tracking: dict[str, str]) -> None:
    """Create the store's database and the experiment if they are not there yet."""
    open_store(tracking["uri"], tracking["experiment"])


def sync_all(state: Path, tracking: dict[str, str]) -> int:
    """Deliver what MLflow lacks of every stage under `state`; returns the number of metrics sent."""
    return sum(deliver(spec.parent, tracking) for spec in sorted(Path(state).glob(f"*/{SPEC_FILE}")))


def deliver(folder: Path, tracking: dict[str, str]) -> int:
    """Bring what a state folder holds and its MLflow run lacks to MLflow; returns the number of metrics sent.

    Finds or creates the run, and its parent, in this store. Raises where the store can't be reached.
    """
    from mlflow.entities import Metric

    store = open_store(tracking["uri"], tracking["experiment"])
    spec = json.loads((folder / SPEC_FILE).read_text())
    target = {"uri": redact(tracking["uri"]), "experiment": tracking["experiment"]}
    sent = _read_sent(folder, target, store)
    if sent is None:
        sent = target | {"run_id": _find_stage_run(store, folder, spec), "bytes": 0, "spec": None}
        write_json(folder / RUN_FILE, sent)
    points, end = _read_points(folder / METRICS_FILE, sent["bytes"])
    for start in range(0, len(points), MAX_METRICS):
        batch = [Metric(*point) for point in points[start : start + MAX_METRICS]]
        store.client.log_batch(sent["run_id"], metrics=batch)
    if spec != sent["spec"]:
        _describe_run(store, sent["run_id"], spec)
    if points or spec != sent["spec"]:
        write_json(folder / RUN_FILE, sent | {"bytes": end, "spec": spec})
    return len(points)


@functools.cache
def open_store(uri: str, experiment: str) -> Store:
    """The store at `uri`, made if it is a local database; calls to a server time out after 5 s and are tried twice."""
    # MLflow's own defaults (120 s, 7 retries with growing pauses) hold a call for many minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # An absent store costs our one warning, not one of each layer below.
    for name in ("urllib3.connectionpool", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    artifacts = None
    if uri.startswith("sqlite:///"):
        database = Path(uri.removeprefix("sqlite:///"))
        database.parent.mkdir(parents=True, exist_ok=True)
        artifacts = str(database.resolve().parent / "mlartifacts")
    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        try:
            return Store(client, client.create_experiment(experiment, artifact_location=artifacts))
        except MlflowException:  # another job was first
            found = client.get_experiment_by_name(experiment)
            if found is None:
                raise
    return Store(client, found.experiment_id)


def find_run(store: Store, tags: dict[str, str]) -> Any | None:
    """The newest MLflow run that has all these tags, or None."""
    condition = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    runs = store.client.search_runs([store.experiment_id], filter_string=condition, max_results=1)
    return runs[0] if runs else None


def find_or_create_run(store: Store, lock: Path, name: str, tags: dict[str, str], started_ms: int | None = None) -> str:
    """Id of the run that these tags identify, created once even if several jobs ask at the same time."""
    from filelock import FileLock

    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock, timeout=LOCK_SECONDS):
        run = find_run(store, tags)
        run = run or store.client.create_run(store.experiment_id, started_ms, tags, run_name=name)
    return run.info.run_id


def find_parent_run(store: Store, lock: Path, parent: ParentRun, started_ms: int | None = None) -> str:
    """Id of a row's run, created if need be."""
    tags = {"kind": "experiment", "row": parent.row, "settings_hash": parent.settings_hash}
    return find_or_create_run(store, lock, parent.row, tags, started_ms)


def log_params(store: Store, run_id: str, params: dict[str, Any]) -> None:
    """Log the nested `params` that the run does not have yet: MLflow takes no second value for one."""
    from mlflow.entities import Param

    known = store.client.get_run(run_id).data.params
    flat = {key: str(value)[:MAX_PARAM_LENGTH] for key, value in flatten(params).items()}
    new = [Param(key, value) for key, value in flat.items() if key not in known]
    for start in range(0, len(new), MAX_PARAMS):
        store.client.log_batch(run_id, params=new[start : start + MAX_PARAMS])


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def environment() -> dict[str, Any]:
    """{"git_commit": hash, "-dirty" behind it where files differ, or None outside a checkout; "versions": {package}}."""
    repository = Path(__file__).resolve().parent.parent
    commit = None
    if (repository / ".git").exists():  # an installed package may lie inside another project's checkout
        command = ["git", "-C", str(repository), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        try:
            commit = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or None
        except (OSError, subprocess.TimeoutExpired):
            logger.warning("git gave no commit; the run is logged without one")
    installed = {package.metadata["Name"]: package.version for package in metadata.distributions()}
    return {"git_commit": commit, "versions": {name: installed[name] for name in PACKAGES if name in installed}}


def now_ms() -> int:
    """Milliseconds since 1970, as MLflow counts time."""
    return time.time_ns() // 1_000_000


def redact(uri: str) -> str:
    """`uri` without user name and password."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri


def warn_undelivered(uri: str, error: Exception) -> None:
    """Say that MLflow is away and how what it lacks gets there."""
    reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    logger.warning(
        "MLflow at %s took nothing (%s). Everything is kept in files and delivered later: by itself, by the next "
        "`dualspeed tables`, or by `dualspeed track sync`.",
        redact(uri),
        reason,
    )


def _write_spec(folder: Path, run: RunSpec) -> dict[str, Any]:
    path = folder / SPEC_FILE
    started = json.loads(path.read_text())["started"] if path.exists() else now_ms()
    parent = [run.parent.row, run.parent.settings_hash] if run.parent else None
    params = {key: str(value) for key, value in flatten(run.params).items()}
    spec = {"name": run.name, "parent": parent, "params": params, "tags": run.tags, "started": started}
    spec |= {"status": "RUNNING", "ended": None}
    write_json(path, spec)
    return spec


def _end_torn_line(path: Path) -> set[tuple[str, int]]:
    """(metric, step) pairs that the file has; a last line cut off by a kill or a full disk is closed, to be skipped."""
    if not path.exists():
        return set()
    if not path.read_bytes().endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")
    return {(key, step) for key, _, _, step in _read_points(path, 0)[0]}


def _read_points(path: Path, offset: int) -> tuple[list[tuple[str, float, int, int]], int]:
    """(key, value, timestamp, step) of each metric in the whole lines after byte `offset`, and where those end."""
    if not path.exists():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        lines = file.read().rpartition(b"\n")[0]
    points = []
    for line in lines.splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # a torn line
        points += [(key, value, record["time"], record["step"]) for key, value in record["metrics"].items()]
    return points, offset + len(lines) + 1 if lines else offset


def _read_sent(folder: Path, target: dict[str, str], store: Store) -> dict[str, Any] | None:
    """What run.json says was delivered to this store, or None where that run is not there (any more)."""
    from mlflow.exceptions import MlflowException

    path = folder / RUN_FILE
    sent = json.loads(path.read_text()) if path.exists() else {}
    if sent.items() < target.items() or not target.items() <= sent.items():
        return None
    try:
        store.client.get_run(sent["run_id"])
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return sent


def _find_stage_run(store: Store, folder: Path, spec: dict[str, Any]) -> str:
    lock = folder.parent / "tracking.lock"
    tags = {"kind": "stage", "state": folder.name}
    if spec["parent"]:
        tags["mlflow.parentRunId"] = find_parent_run(store, lock, ParentRun(*spec["parent"]), spec["started"])
    return find_or_create_run(store, lock, spec["name"], tags, spec["started"])


def _describe_run(store: Store, run_id: str, spec: dict[str, Any]) -> None:
    from mlflow.entities import RunTag

    log_params(store, run_id, spec["params"])
    store.client.log_batch(run_id, tags=[RunTag(key, str(value)) for key, value in spec["tags"].items()])
    if spec["status"] == "RUNNING":
        store.client.update_run(run_id, status="RUNNING")
    else:
        store.client.set_terminated(run_id, spec["status"], spec["ended"])
