"""Runs of rows and sheets in a real MLflow store: each logged once, later if the store could not be reached."""

import json
import os

import pytest
from mlflow import MlflowClient

from dualspeed.errors import ConfigError, TrackingError
from dualspeed.reporting.figures.figures import write_figures
from dualspeed.reporting.mlflow_runs import log_results, sync
from dualspeed.reporting.tables import write_tables
from dualspeed.tracking.metric_log import MetricLog, RunSpec
from dualspeed.tracking.store import Store
from tests.support.results_tree import make_tree


@pytest.fixture
def sheet(tmp_path):
    return make_tree(tmp_path / "results")


def write_and_log(sheet, folder, store):
    """Write tables and figures under `folder` and log them."""
    write_tables(sheet, folder / "tables/demo")
    write_figures(sheet, folder / "figures/demo")
    log_results(sheet, store, folder / "tables/demo", folder / "figures/demo")


def test_rows_reach_mlflow_with_scores_tables_and_config_once(sheet, tmp_path):
    store = Store(f"sqlite:///{tmp_path}/results/mlflow.db", "demo")
    spec = RunSpec("pretrain fast-0", tags={"pretrain_key": "fast-0"})
    with MetricLog(tmp_path / "results/state/abc", None, spec) as log:  # delivered by the tables' job
        log.log(1, {"loss": 1.0}, 1000)
    os.utime(tmp_path / "results/scores/ds-0/full/scienceqa.json", (2_000_000_000, 2_000_000_000))  # its last score
    client = MlflowClient(store.uri)
    counts = []
    for _ in range(2):
        write_and_log(sheet, tmp_path, store)
        runs = list(client.search_runs([client.get_experiment_by_name("demo").experiment_id]))
        counts.append(len(runs))
    assert counts == [1 + 5 + 13 + 1, 1 + 5 + 13 + 1]  # pretraining, rows that were trained, their scores, the sheet
    parents = {run.data.tags["row"]: run for run in runs if run.data.tags["kind"] == "experiment"}
    (pretrain,) = [run for run in runs if run.data.tags["kind"] == "stage"]
    row = parents["ds-0"]
    assert row.info.status == "FINISHED" and row.info.end_time == 2_000_000_000_000
    assert row.data.tags["pretrain_run_id"] == pretrain.info.run_id
    assert row.data.params["dualspeed.pruning_ratio"] == "0.9" and row.data.params["method"] == "dualspeed"
    assert row.data.params["pruner"] == "divprune" and row.data.params["p"] == "0.9"
    assert "pruner" not in parents["base-0"].data.params  # it was trained without one
    assert all(run.info.start_time < run.info.end_time for run in parents.values())
    view = json.loads(client.get_experiment_by_name("demo").tags["mlflow.sharedViewState.best"])
    assert {"metrics.`score/mean`", "metrics.`train_hours`", "params.`method`"} <= set(view["selectedColumns"])
    assert row.data.metrics["score/gqa"] == 72 and row.data.metrics["rel"] == pytest.approx(92.5)
    assert row.data.metrics["speedup_measured"] == pytest.approx(2.985, abs=1e-3)
    (point,) = client.get_metric_history(row.info.run_id, "score/gqa")
    assert point.timestamp == 2_000_000_000_000
    assert parents["naive-0"].data.metrics["score_pruned/mean"] == 65
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == row.info.run_id]
    assert {run.info.run_name for run in children} == {"gqa (full)", "scienceqa (full)"}
    assert all(run.data.metrics["accuracy on _colours_"] == 12.5 for run in children)
    (sheet,) = [run for run in runs if run.data.tags["kind"] == "sheet"]
    assert files(client, row, "config") == {"config/experiment.json", "config/training.json"}
    assert {"tables/table1.md", "tables/scores.csv"} <= files(client, sheet, "tables")
    assert "figures/figure5.png" in files(client, sheet, "figures")


def files(client, run, folder):
    return {entry.path for entry in client.list_artifacts(run.info.run_id, folder)}


def test_store_away_costs_tables_one_warning_and_sync_brings_the_rows_later(sheet, tmp_path, caplog):
    away = Store("http://127.0.0.1:9", "demo")
    write_and_log(sheet, tmp_path, away)
    assert len(caplog.records) == 1 and (tmp_path / "tables/demo/table1.md").exists()
    with pytest.raises(TrackingError, match=r"http://127\.0\.0\.1:9: .*Nothing is lost"):
        sync(tmp_path / "results/state", away)
    store = Store(f"sqlite:///{tmp_path}/late.db", "demo")
    client = MlflowClient(store.uri)
    counts = []
    for _ in range(2):
        sync(tmp_path / "results/state", store)
        runs = list(client.search_runs([client.get_experiment_by_name("demo").experiment_id]))
        counts.append(len(runs))
    assert counts == [5 + 13 + 1] * 2
    (row,) = [run for run in runs if run.data.tags.get("row") == "ds-0"]
    assert row.data.metrics["score/gqa"] == 72 and row.data.metrics["rel"] == pytest.approx(92.5)
    assert len(client.get_metric_history(row.info.run_id, "score/gqa")) == 1


def test_broken_note_of_a_sheet_is_named(tmp_path):
    note = tmp_path / "state/sheets/demo.json"
    note.parent.mkdir(parents=True)
    note.write_text('{"settings": {}}')
    with pytest.raises(ConfigError, match=r"sheets/demo\.json: settings: unknown key"):
        sync(tmp_path / "state", Store(f"sqlite:///{tmp_path}/mlflow.db", "demo"))
