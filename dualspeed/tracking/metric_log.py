"""Log of a job's metrics: written to a local file first, so that training never waits for MLflow.

A job's state folder holds `metrics.jsonl` (see metrics_file.py) and `run_spec.json` (name, parameters, tags and status
of its MLflow run). A thread delivers both to MLflow while the job runs (delivery.py); `dualspeed track sync` delivers
later what the thread could not.
"""

import json
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dualspeed.environment import environment
from dualspeed.errors import TrackingError
from dualspeed.files import write_json
from dualspeed.layout import METRICS_FILE
from dualspeed.tracking.delivery import SPEC_FILE, ParentRun, deliver
from dualspeed.tracking.metrics_file import read_metrics
from dualspeed.tracking.store import Store, flatten, open_store, refusal, warn_undelivered

DELIVERY_SECONDS = 5.0
RETRY_SECONDS = 60.0
CLOSE_SECONDS = 30.0

# Data loading workers start by fork. A process that is forked during a delivery inherits the locks that the delivering
# thread holds, Python's import locks among them, and would wait for them forever. So a fork waits for the delivery.
_delivering = threading.RLock()
os.register_at_fork(before=_delivering.acquire, after_in_parent=_delivering.release, after_in_child=_delivering.release)


@dataclass(frozen=True)
class RunSpec:
    """Description of a job's MLflow run."""

    name: str
    """Name that MLflow shows."""
    parent: ParentRun | None = None
    """Run of the row that the job belongs to; None for a job that rows share."""
    params: dict[str, Any] = field(default_factory=dict)
    """Settings, which may be nested."""
    tags: dict[str, str] = field(default_factory=dict)
    """Tags beside the versions and the git commit, which every run has."""


class MetricLog:
    """Metrics of one job, written to its state folder and delivered to MLflow by a thread.

    With `tracking` None they are written to the folder only. A resumed job continues its run: a metric that an
    earlier job in this folder wrote for a step is not written again. As a context manager it ends the run as FAILED
    after an exception. Threads may share it.
    """

    def __init__(self, folder: Path, tracking: Store | None, run: RunSpec) -> None:
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
        """Write `metrics` of `step`; `timestamp_ms`, in milliseconds since 1970, is now by default."""
        new = {key: float(value) for key, value in metrics.items() if (key, step) not in self._written}
        if not new:
            return
        line = json.dumps({"step": step, "time": timestamp_ms or now_ms(), "metrics": new})
        with self._lock:
            self._file.write(line.encode() + b"\n")
            self._file.flush()

    def close(self, status: str = "FINISHED") -> None:
        """End the run with an MLflow status; waits up to CLOSE_SECONDS for a last delivery."""
        if self._closing.is_set():
            return
        self._file.close()
        write_json(self.folder / SPEC_FILE, self._spec | {"status": status, "ended": now_ms()})
        self._closing.set()
        if self.tracking and self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)
            if self._thread.is_alive():
                warn_undelivered(self.tracking.uri, TimeoutError(f"no answer within {CLOSE_SECONDS:g} s"))

    def __enter__(self) -> "MetricLog":
        return self

    def __exit__(self, error_type: type | None, *_: object) -> None:
        self.close("FINISHED" if error_type is None else "FAILED")

    def _deliver_until_closed(self, tracking: Store) -> None:
        wait, is_last, has_warned = 0.0, False, False
        while not is_last:
            is_last = self._closing.wait(wait)
            try:
                with _delivering:
                    deliver(self.folder, tracking)
                wait = DELIVERY_SECONDS
            except Exception as error:  # no error of MLflow may stop training
                open_store.cache_clear()  # the next try opens it anew: its experiment may have been deleted meanwhile
                wait = RETRY_SECONDS
                if not has_warned:
                    warn_undelivered(tracking.uri, error)
                has_warned = True


def init(tracking: Store) -> None:
    """Create the store's database and the experiment if absent, restore a deleted one; warn if a server is away.

    Raises:
        TrackingError: a local database can't be used.
    """
    try:
        open_store(tracking)
    except Exception as error:
        if not tracking.uri.startswith("http"):
            raise TrackingError(refusal(tracking.uri, error)) from error
        warn_undelivered(tracking.uri, error)


def now_ms() -> int:
    """Current time in milliseconds since 1970, MLflow's unit."""
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
    """End a torn last line, so that the next line is readable; returns the (metric, step) pairs in the file."""
    if not path.exists():
        return set()
    if not path.read_bytes().endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")
    return {(name, line.step) for line in read_metrics(path) for name in line.metrics}
