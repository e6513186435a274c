"""Metrics, written to a local file first and to MLflow second, so that training never waits for a store.

A stage's state folder holds `metrics.jsonl` (one line a step: {"step", "time" in ms, "metrics"}) and `run_spec.json`
(what the run is called and set to). A thread delivers them while the job runs (delivery.py); what it could not
deliver, `sync` brings later.
"""

import json
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dualspeed.environment import environment
from dualspeed.files import write_json
from dualspeed.tracking.delivery import METRICS_FILE, SPEC_FILE, ParentRun, deliver, read_points
from dualspeed.tracking.store import flatten, open_store, warn_undelivered

DELIVERY_SECONDS = 5.0
RETRY_SECONDS = 60.0
CLOSE_SECONDS = 30.0

# A process forked in the middle of a delivery would inherit what the delivering thread has locked, Python's import
# locks among it, and wait for ever: data loading workers start by fork. So a fork waits for the delivery.
_delivering = threading.RLock()
os.register_at_fork(before=_delivering.acquire, after_in_parent=_delivering.release, after_in_child=_delivering.release)


@dataclass(frozen=True)
class RunSpec:
    """What a stage's run is: its name, the row it belongs to (None where rows share it), settings and tags."""

    name: str
    parent: ParentRun | None = None
    params: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


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
        self._lock, self._closing = threading.Lock(), threading.Event()
        path = self.folder / METRICS_FILE
        self._written = _end_torn_line(path)
        self._file = path.open("ab")
        self._thread = threading.Thread(
            target=self._deliver_until_closed, args=(tracking,), name="mlflow-delivery", daemon=True
        )
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
        if self.tracking and self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)
            if self._thread.is_alive():
                warn_undelivered(self.tracking["uri"], TimeoutError(f"no answer within {CLOSE_SECONDS:g} s"))

    def __enter__(self) -> "MetricLog":
        return self

    def __exit__(self, error_type: type | None, *_: object) -> None:
        self.close("FINISHED" if error_type is None else "FAILED")

    def _deliver_until_closed(self, tracking: dict[str, str]) -> None:
        wait, is_last, has_warned = 0.0, False, False
        while not is_last:
            is_last = self._closing.wait(wait)
            try:
                with _delivering:
                    deliver(self.folder, tracking)
                wait = DELIVERY_SECONDS
            except Exception as error:  # whatever MLflow raises, training goes on
                wait = RETRY_SECONDS
                if not has_warned:
                    warn_undelivered(tracking["uri"], error)
                has_warned = True


def init(tracking: dict[str, str]) -> None:
    """Create the store's database and the experiment if they are not there yet; a server that is away costs a warning.

    Raises:
        Exception: what MLflow says of a local database that can't be made.
    """
    try:
        open_store(tracking["uri"], tracking["experiment"])
    except Exception as error:
        if not tracking["uri"].startswith("http"):
            raise
        warn_undelivered(tracking["uri"], error)


def now_ms() -> int:
    """Milliseconds since 1970, as MLflow counts time."""
    return time.time_ns() // 1_000_000


def _write_spec(folder: Path, run: RunSpec) -> dict[str, Any]:
    path = folder / SPEC_FILE
    started = json.loads(path.read_text())["started"] if path.exists() else now_ms()
    ran_on = environment()
    tags = run.tags | {f"version.{name}": version for name, version in ran_on["versions"].items()}
    spec = {
        "name": run.name,
        "parent": [run.parent.row, run.parent.settings_hash] if run.parent else None,
        "params": {key: str(value) for key, value in flatten(run.params).items()},
        "tags": tags | {"git_commit": ran_on["git_commit"] or "unknown"},
        "started": started,
        "status": "RUNNING",
        "ended": None,
    }
    write_json(path, spec)
    return spec


def _end_torn_line(path: Path) -> set[tuple[str, int]]:
    """(metric, step) pairs that the file has; a last line cut off by a kill or a full disk is closed, to be skipped."""
    if not path.exists():
        return set()
    if not path.read_bytes().endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")
    return {(key, step) for points, _ in read_points(path) for key, _, _, step in points}
