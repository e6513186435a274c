"""The MLflow run of each experiment's row: its settings, pretraining, scores, speed and cost; and one for each sheet.

What a sheet shows is noted in the state folder first, so that `sync` can bring to MLflow later what it could not take.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dualspeed.errors import TrackingError
from dualspeed.evaluation.bootstrap import Cell, relative, resample_scores
from dualspeed.files import write_json
from dualspeed.reporting.frames import Results, finetune_path, read_json, read_results, score_path
from dualspeed.reporting.summary import baseline_pairs
from dualspeed.settings.names import averaged
from dualspeed.tracking import mlflow_views as first_page
from dualspeed.tracking.delivery import LOCK_FILE, ParentRun, find_parent_run, sync_state
from dualspeed.tracking.store import (
    LOCK_SECONDS,
    Store,
    find_or_create_run,
    find_runs,
    log_params,
    log_points,
    log_tags,
    metric_name,
    open_store,
    redact,
    warn_undelivered,
)

SHEETS = "sheets"


def log_results(
    settings: dict[str, Any],
    results: Results,
    scores: dict[Cell, np.ndarray],
    tracking: dict[str, str],
    tables: Path,
    figures: Path,
) -> None:
    """Bring MLflow up to date: what stages could not deliver, the run of every trained row, and the sheet's.

    Values that a run has already are not logged again. A store that is away costs a warning; the next call, for any
    sheet, and `sync` deliver what was missed. Settings as in `tables.write_tables`.
    """
    state = Path(settings["results"]) / "state"
    sheet = {"settings": settings, "folders": [str(Path(tables).absolute()), str(Path(figures).absolute())]}
    write_json(state / SHEETS / f"{settings['sheet']}.json", sheet)
    try:
        sync_state(state, tracking)
        log_sheet(open_store(tracking["uri"], tracking["experiment"]), sheet, results, scores)
    except Exception as error:  # tables are written by now, and worth more than their copy
        warn_undelivered(tracking["uri"], error)


def sync(state: Path, tracking: dict[str, str]) -> int:
    """Bring MLflow all that it lacks of the stages and sheets noted under `state`; returns the metrics of stages sent.

    Raises:
        TrackingError: MLflow is away, or refuses something. What has arrived is not sent again by the next call.
    """
    from filelock import Timeout
    from mlflow.exceptions import MlflowException

    try:
        num_sent = sync_state(state, tracking)
        for file in sorted((state / SHEETS).glob("*.json")):
            sheet = json.loads(file.read_text())
            results = read_results(sheet["settings"])
            store = open_store(tracking["uri"], tracking["experiment"])
            log_sheet(store, sheet, results, resample_scores(results.statistics))
    except (MlflowException, Timeout) as error:
        where, reason = redact(tracking["uri"]), redact(str(error))
        raise TrackingError(f"MLflow at {where}: {reason}. Nothing is lost: run this again later.") from error
    return num_sent


def log_sheet(store: Store, sheet: dict[str, Any], results: Results, scores: dict[Cell, np.ndarray]) -> None:
    """Log the run of every row of a sheet that has been trained, then the sheet's own, which holds its tables."""
    from filelock import FileLock

    settings = sheet["settings"]
    root = Path(settings["results"])
    with FileLock(root / "state" / "row_runs.lock", timeout=LOCK_SECONDS):
        trained = [one for one in settings["experiments"] if finetune_path(root, one).exists()]
        metrics = [log_row(store, settings, experiment, results, scores) for experiment in trained]
        first_page.arrange(store, {name for row in metrics for name in row})
        identity = {"kind": "sheet", "sheet": settings["sheet"]}
        run_id = find_or_create_run(store, root / "state" / LOCK_FILE, f"tables of {settings['sheet']}", identity)
        for folder in map(Path, sheet["folders"]):
            store.client.log_artifacts(run_id, str(folder), folder.parent.name)
        store.client.set_terminated(run_id)


def log_row(
    store: Store,
    settings: dict[str, Any],
    experiment: dict[str, Any],
    results: Results,
    scores: dict[Cell, np.ndarray],
) -> dict[str, float]:
    """Log one row's run: params, metrics (returned), its benchmarks as child runs, its configuration as artifacts."""
    root = Path(settings["results"])
    lock, parent = root / "state" / LOCK_FILE, ParentRun(experiment["id"], experiment["settings_hash"])
    run_id = find_parent_run(store, lock, parent, _started_ms(root, experiment))
    log_params(store, run_id, row_params(experiment))
    if experiment["pretrain_key"]:
        link = {"pretrain_key": experiment["pretrain_key"]}
        pretrain = find_runs(store, {"kind": "stage"} | link)
        log_tags(store, run_id, link | ({"pretrain_run_id": pretrain[0].info.run_id} if pretrain else {}))
    run = store.client.get_run(run_id)
    finished_ms = _finished_ms(root, experiment)
    metrics = row_metrics(settings, experiment, results, scores)
    log_new_values(store, run, metrics, finished_ms)
    log_scores(store, run_id, root, experiment, results)
    store.client.log_dict(run_id, experiment, "config/experiment.json")
    store.client.log_artifact(run_id, str(finetune_path(root, experiment)), "config")
    if run.info.status != "FINISHED":
        store.client.set_terminated(run_id, end_time=max(finished_ms, run.info.start_time))
    return metrics


def row_params(experiment: dict[str, Any]) -> dict[str, Any]:
    """A row's settings; first those that name it in the tables, where a Baseline has no pruner."""
    method = experiment["dualspeed"]
    params = {key: experiment[key] for key in ("model", "method", "seed", "dualspeed")}
    params |= {"r": method["slow_mode_ratio"]}
    if experiment["method"] != "baseline":
        params |= {"pruner": method["pruner"], "p": method["pruning_ratio"]}
    return params


def row_metrics(
    settings: dict[str, Any], experiment: dict[str, Any], results: Results, scores: dict[Cell, np.ndarray]
) -> dict[str, float]:
    """score/<benchmark>, score_pruned/<benchmark>, their means, Rel. with its interval, and speed and cost of a row."""
    metrics: dict[str, float] = {}
    benchmarks = averaged(settings["benchmarks"])
    mine = results.scores[results.scores["experiment"] == experiment["id"]]
    for inference, rows in mine.groupby("inference"):
        prefix = "score" if inference == "full" else f"score_{inference}"
        metrics |= {f"{prefix}/{row.benchmark}": row.score for row in rows.itertuples()}
        rows = rows[rows["benchmark"].isin(benchmarks)]
        if len(rows) == len(benchmarks):
            metrics[f"{prefix}/mean"] = rows["score"].mean()
    rel = relative(scores, baseline_pairs(settings, [experiment]), "full", benchmarks)
    if rel is not None:
        low, high = np.percentile(rel[0, 1:], [2.5, 97.5])
        metrics |= {"rel": rel[0, 0], "rel_low": low, "rel_high": high}
    for frame in (results.speed, results.costs):
        numbers = frame.drop(columns=["pruning_ratio", "slow_mode_ratio", "seed"], errors="ignore")
        row = numbers[frame["experiment"] == experiment["id"]].iloc[0]
        metrics |= {key: value for key, value in row.items() if not isinstance(value, str) and not pd.isna(value)}
    return metrics


def log_scores(store: Store, parent_id: str, root: Path, experiment: dict[str, Any], results: Results) -> None:
    """One child run per inference and benchmark, with all of its metrics at the time its scores were written."""
    tags = {"kind": "score", "mlflow.parentRunId": parent_id}
    known = {(run.data.tags["inference"], run.data.tags["benchmark"]): run for run in find_runs(store, tags)}
    mine = results.detail[results.detail["experiment"] == experiment["id"]]
    for (inference, benchmark), rows in mine.groupby(["inference", "benchmark"]):
        written_ms = _modified_ms(score_path(root, experiment["id"], inference, benchmark))
        run = known.get((inference, benchmark)) or store.client.create_run(
            store.experiment_id,
            written_ms,
            tags | {"inference": inference, "benchmark": benchmark},
            run_name=f"{benchmark} ({inference})",
        )
        values = dict(zip(map(metric_name, rows["metric"]), rows["value"], strict=True))
        if log_new_values(store, run, values, written_ms):
            store.client.set_terminated(run.info.run_id, end_time=written_ms)


def log_new_values(store: Store, run: Any, values: dict[str, float], timestamp_ms: int) -> int:
    """Log those `values` that differ from the run's latest, at step 0; returns their number."""
    known = run.data.metrics
    points = [(key, float(value), timestamp_ms, 0) for key, value in values.items() if known.get(key) != float(value)]
    log_points(store, run.info.run_id, points)
    return len(points)


def _modified_ms(path: Path) -> int:
    return path.stat().st_mtime_ns // 1_000_000


def _started_ms(root: Path, experiment: dict[str, Any]) -> int:
    """When a row's finetuning started, for one whose jobs could not say so to MLflow."""
    path = finetune_path(root, experiment)
    return _modified_ms(path) - int(1000 * read_json(path)["train_seconds"])


def _finished_ms(root: Path, experiment: dict[str, Any]) -> int:
    """When the last of a row's scores was written, or its training if there are none."""
    scores = list((root / "scores" / experiment["id"]).glob("*/*.json"))
    return max(_modified_ms(path) for path in [finetune_path(root, experiment), *scores])
