"""Delivery of the metrics in state folders to MLflow: each point once, with its original time.

A state folder has `metrics.jsonl` and `run_spec.json`, which metric_log.py writes, and `run.json`: the id of the
folder's MLflow run, and the byte offset up to which `metrics.jsonl` has been delivered. A process that dies after it
has sent points and before it has written the offset sends them again; MLflow ignores them, since its metric key is
(key, timestamp, step, run, value). One process at a time delivers a folder.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualspeed.errors import TrackingError
from dualspeed.files import write_json
from dualspeed.layout import METRICS_FILE
from dualspeed.tracking.metrics_file import read_metrics
from dualspeed.tracking.store import (
    LOCK_SECONDS,
    MAX_METRICS,
    OpenStore,
    Point,
    Store,
    drop_twins,
    find_or_create_run,
    lifecycle,
    log_params,
    log_points,
    log_tags,
    open_store,
    project_id,
    redact,
)

SPEC_FILE, RUN_FILE = "run_spec.json", "run.json"
LOCK_FILE, DELIVERY_LOCK_FILE = "tracking.lock", "delivery.lock"
DELETED = "the MLflow run of %s was deleted there, so its metrics are not delivered"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ParentRun:
    """Identity of a row's MLflow run, which the runs of all its jobs are children of."""

    row: str
    """Id of the row in the sheet of experiments."""
    settings_hash: str
    """Key of the settings that train it: a row with other settings has another run."""


def sync_state(state: Path, tracking: Store) -> int:
    """Deliver what MLflow lacks of every folder under `state`; returns the number of metrics sent.

    Raises:
        TrackingError: MLflow refused some of the folders; the others were delivered.
    """
    num_sent = 0
    failed: dict[Path, Exception] = {}
    for spec in sorted(Path(state).glob(f"*/{SPEC_FILE}")):
        open_store(tracking)  # raises if the store is away: no folder can be delivered
        try:
            num_sent += deliver(spec.parent, tracking)
        except Exception as error:  # an error of any kind in one folder must not stop the others
            failed[spec.parent] = error
            open_store.cache_clear()
    if failed:
        folder, reason = next(iter(failed.items()))
        raise TrackingError(
            f"{len(failed)} of the folders in {state} were not delivered to {redact(tracking.uri)}; the first, "
            f"{folder.name}: {redact(str(reason))}"
        )
    return num_sent


def deliver(folder: Path, tracking: Store) -> int:
    """Send to MLflow what a state folder's run lacks; returns the number of metrics sent.

    Finds or creates the run and its parent in the store. A run that a person deleted in MLflow stays deleted. Raises
    MLflow's own error if the store can't be reached.
    """
    from filelock import FileLock

    store = open_store(tracking)
    # SQLite allows one writer and refuses others, so all folders share one lock there.
    lock = (folder.parent if store.is_local else folder) / DELIVERY_LOCK_FILE
    with FileLock(lock, timeout=LOCK_SECONDS):
        spec = json.loads((folder / SPEC_FILE).read_text())
        sent = _find_run(store, folder, spec, tracking)
        if sent is None:
            return 0
        num_sent = 0
        for points, end in read_points(folder / METRICS_FILE, sent["bytes"]):
            log_points(store, sent["run_id"], points)
            sent = sent | {"bytes": end}
            write_json(folder / RUN_FILE, sent)
            num_sent += len(points)
        if spec != sent["spec"]:
            drop_twins(store, _identity(folder), project_id(folder.parent), keep=sent["run_id"])
            _describe_run(store, sent["run_id"], spec)
            write_json(folder / RUN_FILE, sent | {"spec": spec})
    return num_sent


def find_parent_run(store: OpenStore, lock: Path, parent: ParentRun, started_ms: int | None = None) -> str:
    """Find or create a row's run; returns its id, which may be that of a run that a person deleted."""
    tags = {"kind": "experiment", "row": parent.row, "settings_hash": parent.settings_hash}
    return find_or_create_run(store, lock, parent.row, tags, started_ms=started_ms)


def read_points(path: Path, offset: int = 0) -> Iterator[tuple[list[Point], int]]:
    """Yield the points behind byte `offset` in parts of about MAX_METRICS, each with the byte offset of its end."""
    points: list[Point] = []
    end = offset
    for line in read_metrics(path, offset):
        points += [(name, value, line.time, line.step) for name, value in line.metrics.items()]
        end = line.end
        if len(points) >= MAX_METRICS:
            yield points, end
            points = []
    if points:
        yield points, end


def _identity(folder: Path) -> dict[str, str]:
    return {"kind": "stage", "state": folder.name}


def _find_run(store: OpenStore, folder: Path, spec: dict[str, Any], tracking: Store) -> dict[str, Any] | None:
    """Find or create the folder's run in this store; returns its run.json, or None if a person deleted the run."""
    path = folder / RUN_FILE
    target = {"uri": redact(tracking.uri), "experiment": tracking.experiment}
    sent = json.loads(path.read_text()) if path.exists() else {}
    if all(sent.get(key) == value for key, value in target.items()):
        stage = lifecycle(store, sent["run_id"])
        if stage == "active":
            return sent
        if stage == "deleted":
            logger.info(DELETED, folder)
            return None
    lock, tags = folder.parent / LOCK_FILE, _identity(folder)
    if spec["parent"]:
        tags["mlflow.parentRunId"] = find_parent_run(store, lock, ParentRun(*spec["parent"]), spec["started"])
    run_id = find_or_create_run(store, lock, spec["name"], _identity(folder), tags, spec["started"])
    if lifecycle(store, run_id) == "deleted":
        logger.info(DELETED, folder)
        return None
    sent = target | {"run_id": run_id, "bytes": 0, "spec": None}
    write_json(path, sent)
    return sent


def _describe_run(store: OpenStore, run_id: str, spec: dict[str, Any]) -> None:
    log_params(store, run_id, spec["params"])
    log_tags(store, run_id, spec["tags"])
    if spec["status"] == "RUNNING":
        store.client.update_run(run_id, status="RUNNING")
    else:
        store.client.set_terminated(run_id, spec["status"], spec["ended"])
