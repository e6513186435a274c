"""MLflow runs of a sheet: one for each trained row, with its settings, scores, speed and cost, and one for the tables.

A note of each logged sheet is kept in the state folder first, so that `sync` can deliver to MLflow later if the store
can't be reached now.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dualspeed.errors import TrackingError
from dualspeed.evaluation.bootstrap import interval_of, relative
from dualspeed.files import write_json
from dualspeed.layout import TRAINING_RECORD, Layout
from dualspeed.reporting.frames import LENGTH, TRAINING_FIELDS, Results, read_fields, read_results
from dualspeed.reporting.summary import with_baseline
from dualspeed.settings.identity import record
from dualspeed.settings.names import averaged
from dualspeed.settings.reading import read_dataclass
from dualspeed.settings.sheet import Row, Sheet
from dualspeed.tracking import mlflow_views
from dualspeed.tracking.delivery import LOCK_FILE, ParentRun, find_parent_run, sync_state
from dualspeed.tracking.store import (
    LOCK_SECONDS,
    OpenStore,
    Store,
    find_or_create_run,
    find_runs,
    lifecycle,
    log_params,
    log_points,
    log_tags,
    metric_name,
    open_store,
    project_id,
    refusal,
    warn_undelivered,
)

SHEETS = "sheets"
ROW_LOCK_FILE = "row_runs.lock"


@dataclass(frozen=True, kw_only=True)
class SheetNote:
    """A logged sheet, as the state folder keeps it."""

    sheet: Sheet
    """Rows, and where their results lie."""
    folders: tuple[str, ...]
    """Folders of its tables and figures, absolute: artifacts of the sheet's run."""


def log_results(sheet: Sheet, tracking: Store, tables: Path, figures: Path) -> None:
    """Bring MLflow up to date: the stages not delivered yet, the run of each trained row, and the sheet's run.

    Values that a run already has are not logged again. A store that can't be reached costs a warning; the next call, of
    any sheet, or `sync` delivers.

    Args:
        tables, figures: folders of the sheet's tables and figures.

    Raises:
        ResultsError: a result is broken.
    """
    state = Path(Layout(sheet.results).state)
    note = SheetNote(sheet=sheet, folders=tuple(str(Path(folder).absolute()) for folder in (tables, figures)))
    write_json(state / SHEETS / f"{sheet.name}.json", record(note))
    results = read_results(sheet)
    try:
        sync_state(state, tracking)
        log_sheet(open_store(tracking), results, note)
    except Exception as error:  # tables are written by now, and worth more than their copy
        warn_undelivered(tracking.uri, error)


def sync(state: Path, tracking: Store) -> int:
    """Deliver to MLflow all that it lacks of the stages and sheets under `state`.

    Returns:
        number of metrics sent for stages.

    Raises:
        TrackingError: MLflow can't be reached, or refuses a call. The next call sends only what hasn't arrived.
        ResultsError, ConfigError: a result or a note is broken.
    """
    from filelock import Timeout
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        num_sent = sync_state(state, tracking)
        for file in sorted((state / SHEETS).glob("*.json")):
            note = read_dataclass(SheetNote, read_fields(file, {}), str(file))
            log_sheet(open_store(tracking), read_results(note.sheet), note)
    except (MlflowException, SQLAlchemyError, OSError, Timeout) as error:
        raise TrackingError(f"{refusal(tracking.uri, error)}. Nothing is lost: run this again later.") from error
    return num_sent


def log_sheet(store: OpenStore, results: Results, note: SheetNote) -> None:
    """Log the run of each trained row, then the sheet's run with its tables and figures as artifacts."""
    from filelock import FileLock

    sheet, state = results.sheet, Path(results.layout.state)
    with FileLock(state / ROW_LOCK_FILE, timeout=LOCK_SECONDS):
        trained = [row for row in sheet.rows if training_file(results.layout, row).exists()]
        metrics = [log_row(store, results, row) for row in trained]
        mlflow_views.arrange(store, {name for values in metrics for name in values})
        identity = {"kind": "sheet", "sheet": sheet.name}
        run_id = find_or_create_run(store, state / LOCK_FILE, f"tables of {sheet.name}", identity)
        if lifecycle(store, run_id) == "deleted":
            return
        for folder in map(Path, note.folders):
            store.client.log_artifacts(run_id, str(folder), folder.parent.name)
        store.client.set_terminated(run_id)


def log_row(store: OpenStore, results: Results, row: Row) -> dict[str, float]:
    """Log one row: params, metrics, a child run for each score, its configuration as artifacts.

    Returns:
        the metrics of the row.
    """
    lock = Path(results.layout.state) / LOCK_FILE
    parent = ParentRun(row.id, row.settings_hash)
    run_id = find_parent_run(store, lock, parent, _started_ms(results.layout, row))
    if lifecycle(store, run_id) == "deleted":  # by a person, and stays so
        return {}
    log_params(store, run_id, row_params(row))
    if row.pretrain_key is not None:
        link = {"pretrain_key": row.pretrain_key}
        pretrain = find_runs(store, {"kind": "stage"} | link, project_id(lock.parent))
        log_tags(store, run_id, link | ({"pretrain_run_id": pretrain[0].info.run_id} if pretrain else {}))
    run = store.client.get_run(run_id)
    finished_ms = _finished_ms(results, row)
    metrics = row_metrics(results, row)
    log_new_values(store, run, metrics, finished_ms)
    log_scores(store, run_id, results, row)
    store.client.log_dict(run_id, record(row), "config/experiment.json")
    store.client.log_artifact(run_id, str(training_file(results.layout, row)), "config")
    if run.info.status != "FINISHED":
        store.client.set_terminated(run_id, end_time=max(finished_ms, run.info.start_time))
    return metrics


def row_params(row: Row) -> dict[str, Any]:
    """Settings of a row; also under the names of the tables, p, r and pruner, of which a Baseline has only r."""
    params = {"model": row.model, "method": row.method, "seed": row.seed, "dualspeed": record(row.dualspeed)}
    params |= {"r": row.dualspeed.slow_mode_ratio} if row.dualspeed.slow_steps is None else {}
    if row.method != "baseline":
        params |= {"pruner": row.dualspeed.pruner, "p": row.dualspeed.pruning_ratio}
    return params


def row_metrics(results: Results, row: Row) -> dict[str, float]:
    """score/<benchmark>, score_pruned/<benchmark>, their means, Rel. with its interval, speed and cost of a row."""
    metrics: dict[str, float] = {}
    benchmarks = averaged(results.benchmarks)
    scores = results.scores[results.scores["experiment"] == row.id]
    for inference, group in scores.groupby("inference"):
        prefix = "score" if inference == "full" else f"score_{inference}"
        metrics |= {f"{prefix}/{score.benchmark}": score.score for score in group.itertuples()}
        group = group[group["benchmark"].isin(benchmarks)]
        if len(group) == len(benchmarks):
            metrics[f"{prefix}/mean"] = group["score"].mean()
    rel = relative(results.draws, with_baseline(results.sheet, [row]), "full", benchmarks)
    if rel is not None:
        low, high = interval_of(rel[0])
        # MLflow's databases would keep an inf, of a Baseline that scored 0, as the largest number that they have.
        shown = {"rel": rel[0, 0], "rel_low": low, "rel_high": high}
        metrics |= {key: value for key, value in shown.items() if np.isfinite(value)}
    for frame in (results.speed, results.costs):
        numbers = frame.drop(columns=["pruning_ratio", "slow_mode_ratio", "seed", *LENGTH], errors="ignore")
        values = numbers[frame["experiment"] == row.id].iloc[0]
        metrics |= {key: value for key, value in values.items() if not isinstance(value, str) and not pd.isna(value)}
    return metrics


def log_scores(store: OpenStore, parent_id: str, results: Results, row: Row) -> None:
    """Log a child run for each score of a row: all of its metrics, at the time when its file was written."""
    tags = {"kind": "score", "mlflow.parentRunId": parent_id}
    runs = find_runs(store, tags, with_deleted=True)
    runs.sort(key=lambda run: run.info.lifecycle_stage == "active")  # of two, the one that is there
    known = {(run.data.tags["inference"], run.data.tags["benchmark"]): run for run in runs}
    detail = results.detail[results.detail["experiment"] == row.id]
    for (inference, benchmark), metrics in detail.groupby(["inference", "benchmark"]):
        written_ms = _modified_ms(Path(results.layout.score(row.id, inference, benchmark)))
        run = known.get((inference, benchmark))
        if run and run.info.lifecycle_stage == "deleted":
            continue
        run = run or store.client.create_run(
            store.experiment_id,
            written_ms,
            tags | {"inference": inference, "benchmark": benchmark},
            run_name=f"{benchmark} ({inference})",
        )
        values = dict(zip(map(metric_name, metrics["metric"]), metrics["value"], strict=True))
        if log_new_values(store, run, values, written_ms):
            store.client.set_terminated(run.info.run_id, end_time=written_ms)


def log_new_values(store: OpenStore, run: Any, values: dict[str, float], timestamp_ms: int) -> int:
    """Log at step 0 the `values` that differ from the run's latest; returns their number."""
    known = run.data.metrics
    points = [(key, float(value), timestamp_ms, 0) for key, value in values.items() if known.get(key) != float(value)]
    log_points(store, run.info.run_id, points)
    return len(points)


def training_file(layout: Layout, row: Row) -> Path:
    """Training record of a row's finetuning."""
    return Path(layout.model(row.id)) / TRAINING_RECORD


def _modified_ms(path: Path) -> int:
    return path.stat().st_mtime_ns // 1_000_000


def _started_ms(layout: Layout, row: Row) -> int:
    """Start of a row's finetuning in ms since 1970, for a run that its jobs could not create in MLflow."""
    path = training_file(layout, row)
    return _modified_ms(path) - int(1000 * read_fields(path, TRAINING_FIELDS)["train_seconds"])


def _finished_ms(results: Results, row: Row) -> int:
    """Time in ms since 1970 when the last of a row's scores was written; its training's end if there are none."""
    scores = results.scores[results.scores["experiment"] == row.id].itertuples()
    files = [Path(results.layout.score(row.id, score.inference, score.benchmark)) for score in scores]
    return max(_modified_ms(path) for path in [training_file(results.layout, row), *files])
