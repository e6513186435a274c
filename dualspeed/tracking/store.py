"""The MLflow store: opening it with short timeouts, finding or creating runs by their tags, logging to them.

Importing MLflow takes seconds, so each function that needs it imports it.
"""

import functools
import logging
import os
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOCK_SECONDS, CREATE_SECONDS = 30.0, 120.0
PATIENT_SECONDS = 60
MAX_METRICS, MAX_PARAMS, MAX_PARAM_LENGTH = 1000, 100, 6000  # limits of MLflow: per call, and per value
PROJECT, PROJECT_FILE = "project", "project_id"
CREATED_AS = "dualspeed.created_as"  # tag of an experiment
Point = tuple[str, float, int, int]
"""Metric, value, time in ms since 1970, step."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Store:
    """Address of an MLflow store, and the experiment in it that all runs belong to."""

    uri: str
    """`sqlite:///<path>` or `http(s)://<host>:<port>`."""
    experiment: str
    """Name of the experiment."""


@dataclass(frozen=True)
class OpenStore:
    """An MLflow store with a client and its experiment created."""

    client: Any
    """`MlflowClient`."""
    experiment_id: str
    """MLflow's id of the experiment."""
    is_local: bool
    """True for an SQLite file, False for a server."""


def be_patient() -> None:
    """Set the timeout of calls to a server to a minute instead of 5 s, for a command whose purpose is delivery."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(PATIENT_SECONDS))


@functools.cache
def open_store(store: Store) -> OpenStore:
    """Open a store; create a local database and the experiment if absent.

    Calls to a server time out after 5 s and are tried twice.
    """
    # With MLflow's own defaults (120 s, 7 retries with growing pauses) a call may take many minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # A store that is away gives our one warning, without those of the layers below.
    for name in ("urllib3.connectionpool", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    from filelock import FileLock
    from mlflow import MlflowClient

    if not store.uri.startswith("sqlite:///"):
        client = MlflowClient(tracking_uri=store.uri)
        return OpenStore(client, _open_experiment(client, store.experiment, None), is_local=False)
    database = Path(store.uri.removeprefix("sqlite:///").partition("?")[0])
    database.parent.mkdir(parents=True, exist_ok=True)
    artifacts = (database.resolve().parent / "mlartifacts").as_uri()  # of a path, MLflow would read %20 as a blank
    with FileLock(f"{database}.lock", timeout=CREATE_SECONDS):  # two jobs that create its tables at once break them
        client = MlflowClient(tracking_uri=store.uri)
        return OpenStore(client, _open_experiment(client, store.experiment, artifacts), is_local=True)


def _open_experiment(client: Any, name: str, artifacts: str | None) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        _warn_renamed(client, name)
        try:
            return client.create_experiment(name, artifact_location=artifacts, tags={CREATED_AS: name})
        except MlflowException:  # another job was first
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        # MLflow keeps its name taken, and refuses every call to it.
        try:
            client.restore_experiment(found.experiment_id)
        except MlflowException:  # unless another job was first
            if client.get_experiment(found.experiment_id).lifecycle_stage == "deleted":
                raise
        logger.warning(
            "the MLflow experiment %r was deleted there; it is restored, with all of its runs. To start an empty one, "
            "change `tracking.experiment`",
            name,
        )
    return found.experiment_id


def _warn_renamed(client: Any, name: str) -> None:
    """Say that an experiment which is about to be made has been made before, and has another name now."""
    for found in client.search_experiments(filter_string=f"tags.`{CREATED_AS}` = '{name}'"):
        logger.warning(
            "the MLflow experiment %r was renamed to %r; a new one is made. To go on in the renamed one, set "
            "`tracking.experiment` to its name",
            name,
            found.name,
        )


def project_id(state: Path) -> str:
    """Id of the project whose state folders lie in `state`; made on the first call. Moving the folder keeps it.

    Two projects may log to one experiment: equal names of rows and states don't make their runs the same.
    """
    path = state / PROJECT_FILE
    if not path.exists():
        state.mkdir(parents=True, exist_ok=True)
        new = state / f".{PROJECT_FILE}.{uuid.uuid4().hex}"
        new.write_text(uuid.uuid4().hex[:16])
        try:
            os.link(new, path)
        except FileExistsError:  # another job was first
            pass
        except OSError:  # a file system without links
            shutil.copyfile(new, path)
        new.unlink()
    return path.read_text().strip()


def find_runs(
    store: OpenStore, tags: dict[str, str], project: str | None = None, with_deleted: bool = False
) -> list[Any]:
    """The MLflow runs that have all these tags, newest first.

    Args:
        project: leave out runs of other projects; runs without this tag are nobody else's. None: of every project.
        with_deleted: take also those that a person deleted.
    """
    from mlflow.entities import ViewType

    condition = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    kind = ViewType.ALL if with_deleted else ViewType.ACTIVE_ONLY
    runs = store.client.search_runs([store.experiment_id], filter_string=condition, run_view_type=kind)
    return [run for run in runs if project is None or run.data.tags.get(PROJECT, project) == project]


def find_or_create_run(
    store: OpenStore,
    lock: Path,
    name: str,
    identity: dict[str, str],
    tags: dict[str, str] | None = None,
    started_ms: int | None = None,
) -> str:
    """Find the run of this project with the tags `identity`, or create it with `tags` too; returns its id.

    Several jobs may call this at once: the file `lock`, in the project's state folder, lets one of them create the run.
    A run that a person deleted stays deleted: its id is returned (see `lifecycle`), and no other run is made.
    """
    from filelock import FileLock

    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock, timeout=LOCK_SECONDS):
        project = project_id(lock.parent)
        if (run_id := drop_twins(store, identity, project)) is not None:
            return run_id
        if deleted := find_runs(store, identity, project, with_deleted=True):
            return deleted[0].info.run_id
        tags = identity | {PROJECT: project} | (tags or {})
        run = store.client.create_run(store.experiment_id, started_ms, tags, run_name=name)
        return run.info.run_id


def drop_twins(store: OpenStore, identity: dict[str, str], project: str, keep: str | None = None) -> str | None:
    """Delete all runs of a project with these tags but one; returns the id of that one, None if there is no run.

    Twins come from a server that hangs and creates a run after its caller has given up and asked again. `keep` is the
    run to keep; without it, the one with children, or with most metrics, since a twin has neither.
    """
    runs = find_runs(store, identity, project)
    if len(runs) > 1:

        def content(run: Any) -> tuple[bool, int, int, str]:
            children = find_runs(store, {"mlflow.parentRunId": run.info.run_id})
            return run.info.run_id == keep, len(children), len(run.data.metrics), run.info.run_id

        runs.sort(key=content, reverse=True)
        for twin in runs[1:]:
            store.client.delete_run(twin.info.run_id)
    return runs[0].info.run_id if runs else None


def lifecycle(store: OpenStore, run_id: str) -> str | None:
    """Lifecycle stage of a run, "active" or "deleted"; None if it isn't in the store."""
    from mlflow.exceptions import MlflowException

    try:
        return store.client.get_run(run_id).info.lifecycle_stage
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def log_params(store: OpenStore, run_id: str, params: dict[str, Any]) -> None:
    """Log those of the nested `params` that the run lacks: MLflow refuses a second value of a parameter."""
    from mlflow.entities import Param

    known = store.client.get_run(run_id).data.params
    flat = {key: str(value)[:MAX_PARAM_LENGTH] for key, value in flatten(params).items()}
    new = [Param(key, value) for key, value in flat.items() if key not in known]
    for start in range(0, len(new), MAX_PARAMS):
        store.client.log_batch(run_id, params=new[start : start + MAX_PARAMS])


def log_tags(store: OpenStore, run_id: str, tags: dict[str, str]) -> None:
    """Set tags; an existing tag gets the new value."""
    from mlflow.entities import RunTag

    store.client.log_batch(run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])


def log_points(store: OpenStore, run_id: str, points: list[Point]) -> None:
    """Log points; MLflow ignores those that the run has already."""
    from mlflow.entities import Metric

    metrics = [Metric(metric_name(key), value, timestamp, step) for key, value, timestamp, step in points]
    for start in range(0, len(metrics), MAX_METRICS):
        store.client.log_batch(run_id, metrics=metrics[start : start + MAX_METRICS])


def metric_name(text: str) -> str:
    """Name of a metric in MLflow: `text` with _ for each character that MLflow refuses."""
    return re.sub(r"[^\w\-./ :]", "_", text)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def redact(text: str) -> str:
    """Remove user name and password from the URIs in `text`."""
    return re.sub(r"//[^/\s]*@", "//", text)


def refusal(uri: str, error: Exception) -> str:
    """One sentence on why a store can't be used, and what to do."""
    reason = redact((str(error) or type(error).__name__).splitlines()[0][:200])
    if "out-of-date database schema" in reason:
        versions = re.findall(r"version (\w+), but expected (\w+)", reason)
        found = " (schema {}, this one has {})".format(*versions[0]) if versions else ""
        reason = (
            f"the store is of another version of MLflow{found}: after a backup, run `mlflow db upgrade {redact(uri)}`; "
            "where that finds no such schema, a newer MLflow has upgraded it: install that one"
        )
    return f"MLflow at {redact(uri)}: {reason}"


def warn_undelivered(uri: str, error: Exception) -> None:
    """Warn that MLflow can't be reached, and say how the metrics will be delivered."""
    where, _, reason = refusal(uri, error).partition(": ")
    logger.warning(
        "%s took nothing (%s). All metrics are kept in files and delivered later: automatically once MLflow "
        "is back, or by `dualspeed track sync`.",
        where,
        reason,
    )
