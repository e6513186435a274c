"""The MLflow store: opened with short timeouts, and runs that are found by their tags before they are created.

MLflow costs seconds to import, so each function that needs it imports it.
"""

import functools
import logging
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

LOCK_SECONDS = 30.0
MAX_METRICS, MAX_PARAMS, MAX_PARAM_LENGTH = 1000, 100, 6000  # what MLflow takes in one call, and in one value
logger = logging.getLogger(__name__)


class Store(NamedTuple):
    """An open MLflow store: its client and the experiment that everything goes to."""

    client: Any
    experiment_id: str


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
        database = Path(uri.removeprefix("sqlite:///").partition("?")[0])
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


def find_runs(store: Store, tags: dict[str, str]) -> list[Any]:
    """The MLflow runs that have all these tags, newest first."""
    condition = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    return list(store.client.search_runs([store.experiment_id], filter_string=condition))


def find_or_create_run(store: Store, lock: Path, name: str, tags: dict[str, str], started_ms: int | None = None) -> str:
    """Id of the run that these tags identify, created once even if several jobs ask at the same time."""
    from filelock import FileLock

    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock, timeout=LOCK_SECONDS):
        runs = find_runs(store, tags) or [store.client.create_run(store.experiment_id, started_ms, tags, run_name=name)]
    return runs[0].info.run_id


def has_run(store: Store, run_id: str) -> bool:
    """Whether the store knows this run."""
    from mlflow.exceptions import MlflowException

    try:
        store.client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return True


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


def log_points(store: Store, run_id: str, points: list[tuple[str, float, int, int]]) -> None:
    """Log (metric, value, timestamp in ms, step) points; those that the run has already are absorbed."""
    from mlflow.entities import Metric

    for start in range(0, len(points), MAX_METRICS):
        store.client.log_batch(run_id, metrics=[Metric(*point) for point in points[start : start + MAX_METRICS]])


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
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
        "MLflow at %s took nothing (%s). Everything is kept in files and delivered later: by itself, by the next "
        "`dualspeed tables`, or by `dualspeed track sync`.",
        redact(uri),
        redact(reason),
    )
