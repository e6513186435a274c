"""What the state folders hold, brought to MLflow: once, with the original times, by one process at a time.

A state folder has `metrics.jsonl` and `run_spec.json` (metric_log.py writes them) and `run.json`: the folder's
MLflow run, and how far the lines have been delivered. MLflow's metric key (key, timestamp, step, run, value) absorbs
what arrives twice because a process died between sending and noting it.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualspeed.errors import TrackingError
from dualspeed.files import write_json
from dualspeed.tracking.store import (
    LOCK_SECONDS,
    MAX_METRICS,
    Point,
    Store,
    drop_twins,
    find_or_create_run,
    lifecycle,
    log_params,
    log_points,
    log_tags,
    open_store,
    redact,
)

METRICS_FILE, SPEC_FILE, RUN_FILE = "metrics.jsonl", "run_spec.json", "run.json"
LOCK_FILE, DELIVERY_LOCK_FILE = "tracking.lock", "delivery.lock"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ParentRun:
    """The run of an experiment's row: one for each (row, hash of its settings), however often its jobs run."""

    row: str
    settings_hash: str


def sync_state(state: Path, tracking: dict[str, str]) -> int:
    """Deliver what MLflow lacks of every stage under `state`; returns the number of metrics sent.

    Raises:
        TrackingError: some folders could not be delivered; all the others were.
    """
    num_sent = 0
    failed: dict[Path, Exception] = {}
    for spec in sorted(Path(state).glob(f"*/{SPEC_FILE}")):
        open_store(tracking["uri"], tracking["experiment"])  # raises, as nothing can be delivered
        try:
            num_sent += deliver(spec.parent, tracking)
        except Exception as error:  # whatever MLflow raises, the other folders are tried
            failed[spec.parent] = error
            open_store.cache_clear()
    if failed:
        folder, reason = next(iter(failed.items()))
        raise TrackingError(
            f"{len(failed)} of the folders in {state} were not delivered to {redact(tracking['uri'])}; the first, "
            f"{folder.name}: {redact(str(reason))}"
        )
    return num_sent


def deliver(folder: Path, tracking: dict[str, str]) -> int:
    """Bring what a state folder holds and its MLflow run lacks to MLflow; returns the number of metrics sent.

    Finds or creates the run, and its parent, in this store. A run that a person deleted there stays deleted. Raises
    where the store can't be reached.
    """
    from filelock import FileLock

    store = open_store(tracking["uri"], tracking["experiment"])
    # SQLite takes one writer and turns others away, so all folders share a lock there.
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
            _describe_run(store, sent["run_id"], spec, _identity(folder))
            write_json(folder / RUN_FILE, sent | {"spec": spec})
    return num_sent


def find_parent_run(store: Store, lock: Path, parent: ParentRun, started_ms: int | None = None) -> str:
    """Id of a row's run, created if need be."""
    tags = {"kind": "experiment", "row": parent.row, "settings_hash": parent.settings_hash}
    return find_or_create_run(store, lock, parent.row, tags, started_ms=started_ms)


def read_points(path: Path, offset: int = 0) -> Iterator[tuple[list[Point], int]]:
    """The metrics of the whole lines after byte `offset`, some MAX_METRICS at a time, with the byte where they end."""
    if not path.exists():
        return
    points, end = [], offset
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                break  # still being written, or torn
            end += len(line)
            try:
                record = json.loads(line)
            except ValueError:
                continue  # torn by a kill or a full disk, then closed
            points += [(key, value, record["time"], record["step"]) for key, value in record["metrics"].items()]
            if len(points) >= MAX_METRICS:
                yield points, end
                points = []
    if end > offset:
        yield points, end


def _identity(folder: Path) -> dict[str, str]:
    return {"kind": "stage", "state": folder.name}


def _find_run(store: Store, folder: Path, spec: dict[str, Any], tracking: dict[str, str]) -> dict[str, Any] | None:
    """run.json of this store's run, which is created if need be; None where someone has deleted it."""
    path = folder / RUN_FILE
    target = {"uri": redact(tracking["uri"]), "experiment": tracking["experiment"]}
    sent = json.loads(path.read_text()) if path.exists() else {}
    if all(sent.get(key) == value for key, value in target.items()):
        stage = lifecycle(store, sent["run_id"])
        if stage == "active":
            return sent
        if stage == "deleted":
            logger.info("the run of %s was deleted in MLflow: its metrics stay in the folder", folder)
            return None
    lock, tags = folder.parent / LOCK_FILE, _identity(folder)
    if spec["parent"]:
        tags["mlflow.parentRunId"] = find_parent_run(store, lock, ParentRun(*spec["parent"]), spec["started"])
    run_id = find_or_create_run(store, lock, spec["name"], _identity(folder), tags, spec["started"])
    sent = target | {"run_id": run_id, "bytes": 0, "spec": None}
    write_json(path, sent)
    return sent


def _describe_run(store: Store, run_id: str, spec: dict[str, Any], identity: dict[str, str]) -> None:
    drop_twins(store, identity, keep=run_id)
    log_params(store, run_id, spec["params"])
    log_tags(store, run_id, spec["tags"])
    if spec["status"] == "RUNNING":
        store.client.update_run(run_id, status="RUNNING")
    else:
        store.client.set_terminated(run_id, spec["status"], spec["ended"])
