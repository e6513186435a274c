"""The MLflow store: opened with short timeouts, and runs that are found by their tags before they are created.

MLflow costs seconds to import, so each function that needs it imports it.
"""

import functools
import logging
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

LOCK_SECONDS, CREATE_SECONDS = 30.0, 120.0
PATIENT_SECONDS = 60
MAX_METRICS, MAX_PARAMS, MAX_PARAM_LENGTH = 1000, 100, 6000  # what MLflow takes in one call, and in one value
Point = tuple[str, float, int, int]
"""Metric, value, timestamp in ms, step."""
logger = logging.getLogger(__name__)


class Store(NamedTuple):
    """An open MLflow store: its client, the experiment that everything goes to, and whether it is a file of ours."""

    client: Any
    experiment_id: str
    is_local: bool


def be_patient() -> None:
    """Give a server a minute for each call instead of 5 s: where somebody waits for delivery, and not for training."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(PATIENT_SECONDS))


@functools.cache
def open_store(uri: str, experiment: str) -> Store:
    """The store at `uri`, made if it is a local database; calls to a server time out after 5 s and are tried twice."""
    # MLflow's own defaults (120 s, 7 retries with growing pauses) hold a call for many minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # An absent store costs our one warning, not one of each layer below.
    for name in ("urllib3.connectionpool", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    from filelock import FileLock
    from mlflow import MlflowClient

    if not uri.startswith("sqlite:///"):
        client = MlflowClient(tracking_uri=uri)
        return Store(client, _open_experiment(client, experiment, None), is_local=False)
    database = Path(uri.removeprefix("sqlite:///").partition("?")[0])
    database.parent.mkdir(parents=True, exist_ok=True)
    artifacts = str(database.resolve().parent / "mlartifacts")
    with FileLock(f"{database}.lock", timeout=CREATE_SECONDS):  # jobs that create its tables together break them
        client = MlflowClient(tracking_uri=uri)
        return Store(client, _open_experiment(client, experiment, artifacts), is_local=True)


def _open_experiment(client: Any, name: str, artifacts: str | None) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=artifacts)
        except MlflowException:  # another job was first
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return found.experiment_id


def find_runs(store: Store, tags: dict[str, str]) -> list[Any]:
    """The MLflow runs that have all these tags, newest first."""
    condition = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    return list(store.client.search_runs([store.experiment_id], filter_string=condition))


def find_or_create_run(
    store: Store,
    lock: Path,
    name: str,
    identity: dict[str, str],
    tags: dict[str, str] | None = None,
    started_ms: int | None = None,
) -> str:
    """Id of the run that the tags `identity` find, created once, with `tags`, even if several jobs ask together."""
    from filelock import FileLock

    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock, timeout=LOCK_SECONDS):
        if (run_id := drop_twins(store, identity)) is not None:
            return run_id
        run = store.client.create_run(store.experiment_id, started_ms, identity | (tags or {}), run_name=name)
        return run.info.run_id


def drop_twins(store: Store, identity: dict[str, str], keep: str | None = None) -> str | None:
    """Id of the one run with these tags, None if there is none; others are deleted.

    A server that hangs may create a run after its caller has given up and asked again. `keep` is the one that stays;
    without it, the one that has children or most metrics, which a twin has not.
    """
    runs = find_runs(store, identity)
    if len(runs) > 1:

        def content(run: Any) -> tuple[bool, int, int, str]:
            children = find_runs(store, {"mlflow.parentRunId": run.info.run_id})
            return run.info.run_id == keep, len(children), len(run.data.metrics), run.info.run_id

        runs.sort(key=content, reverse=True)
        for twin in runs[1:]:
            store.client.delete_run(twin.info.run_id)
    return runs[0].info.run_id if runs else None


def lifecycle(store: Store, run_id: str) -> str | None:
    """active or deleted; None if the store does not know this run."""
    from mlflow.exceptions import MlflowException

    try:
        return store.client.get_run(run_id).info.lifecycle_stage
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def log_params(store: Store, run_id: str, params: dict[str, Any]) -> None:
    """Log the nested `params` that the run does not have yet: MLflow takes no second value for one."""
    from mlflow.entities import Param

    known = store.client.get_run(run_id).data.params
    flat = {key: str(value)[:MAX_PARAM_LENGTH] for key, value in flatten(params).items()}
    new = [Param(key, value) for key, value in flat.items() if key not in known]
    for start in range(0, len(new), MAX_PARAMS):
        store.client.log_batch(run_id, params=new[start : start + MAX_PARAMS])


def log_tags(store: Store, run_id: str, tags: dict[str, str]) -> None:
    """Set tags; one that is there gets the new value."""
    from mlflow.entities import RunTag

    store.client.log_batch(run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])


def log_points(store: Store, run_id: str, points: list[Point]) -> None:
    """Log points; those that the run has already are absorbed. A character that MLflow refuses in a name becomes _."""
    from mlflow.entities import Metric

    metrics = [Metric(metric_name(key), value, timestamp, step) for key, value, timestamp, step in points]
    for start in range(0, len(metrics), MAX_METRICS):
        store.client.log_batch(run_id, metrics=metrics[start : start + MAX_METRICS])


def metric_name(text: str) -> str:
    """`text` with what MLflow takes in a name."""
    return re.sub(r"[^\w\-./ :]", "_", text)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def redact(text: str) -> str:
    """`text` with user name and password taken out of the URIs in it."""
    return re.sub(r"//[^/\s]*@", "//", text)


def warn_undelivered(uri: str, error: Exception) -> None:
    """Say that MLflow is away and how what it lacks gets there."""
    reason = (str(error) or type(error).__name__).splitlines()[0][:200]
    logger.warning(
        "MLflow at %s took nothing (%s). Everything is kept in files and delivered later: by itself once MLflow is "
        "back, or by `dualspeed track sync`.",
        redact(uri),
        redact(reason),
    )
