"""Views of MLflow's page of an experiment: which run is best, and what did it cost?

By default the page lists names and times of all runs, newest first. Our views, in MLflow's own format and stored as
tags of the experiment, list one line for each row of the sheet instead, best first, with its settings, scores, speed
and cost; they also draw a bar for each row, and the curves of each finetuning. The experiment's note links to them.
Columns that a reader has chosen stay as they are.
"""

import json
from collections.abc import Iterable
from typing import Any

from dualspeed.tracking.store import OpenStore

VIEW, CURVES = "best", "curves"
TITLE = "Which run is best, and what did it cost?"
CHARTS_TITLE, CURVES_TITLE = "The same as charts", "Learning curves"
# Parameter -> width of its column in pixels.
SETTINGS = {"method": 110, "pruner": 110, "p": 60, "r": 60, "seed": 70}
# By importance; a metric that no run has is left out, such as GPU hours in the demo.
METRICS = ("score/mean", "rel", "speedup_measured", "train_hours", "gpu_hours", "peak_memory_bytes")
CURVE_METRICS = ("loss", "validation/answer_accuracy", "fast/ce_loss", "slow/ce_loss", "samples_per_second")
NAME = "attributes.`Run Name`"
# MLflow draws all other metrics too: below ours, in sections that start closed.
OTHER_SECTIONS = ("score", "score_pruned", "fast", "slow", "validation", "learning_rate", "Model metrics")


def view_path(experiment_id: str, view: str = VIEW, as_charts: bool = False) -> str:
    """Path of a view, relative to the server's address."""
    charts = "&compareRunsMode=CHART" if as_charts else ""
    return f"#/experiments/{experiment_id}/runs?viewStateShareKey={view}{charts}"


def arrange(store: OpenStore, metrics: Iterable[str]) -> None:
    """Set the experiment's views and its note.

    Args:
        metrics: names of the metrics that its rows have; the views show those that METRICS names.
    """
    shown = [name for name in METRICS if name in set(metrics)]
    widths = {NAME: 270} | {f"metrics.`{name}`": 20 + 8 * max(len(name), 9) for name in shown}
    widths |= {f"params.`{name}`": width for name, width in SETTINGS.items()}
    best = {
        "searchFilter": "tags.kind = 'experiment'",
        "orderByKey": "metrics.`score/mean`",
        "orderByAsc": False,
        "selectedColumns": [column for column in widths if column != NAME],
        "columnOrder": list(widths),
        "columnWidths": widths,
        **charts("BAR", "Score, speed, cost", shown),
    }
    curves = {
        "searchFilter": "tags.stage = 'finetune'",
        # Sorted by time, MLflow would show the parents too, which have no curves.
        "orderByKey": "metrics.`loss`",
        "orderByAsc": True,
        **charts("LINE", CURVES_TITLE, CURVE_METRICS, xAxisKey="time-relative", useGlobalXaxisKey=False),
    }
    paths = {
        TITLE: view_path(store.experiment_id),
        CHARTS_TITLE: view_path(store.experiment_id, as_charts=True),
        CURVES_TITLE: view_path(store.experiment_id, CURVES, as_charts=True),
    }
    note = (
        " | ".join(f"**[{title}]({path})**" for title, path in paths.items()) + "\n\n"
        "One run for each row of the sheet of experiments, with its scores, speed and cost; under it the runs of its "
        "training and of each benchmark. A pretraining that rows share is a run of its own, named in their tag "
        "`pretrain_run_id`. Tables and figures of a sheet are artifacts of the run `tables of <sheet>`.\n\n"
        "`score/mean`: mean over the benchmarks on full tokens, in percent. `rel`: score relative to the Baseline of "
        "the same seed, in percent, `rel_low` and `rel_high` its 95 % interval. `speedup_measured`: time of a step, "
        "Baseline over this run. `train_hours`: pretraining and finetuning, wall clock."
    )
    tags = {
        f"mlflow.sharedViewState.{VIEW}": json.dumps(best),
        f"mlflow.sharedViewState.{CURVES}": json.dumps(curves),
        "mlflow.note.content": note,
        "mlflow.experimentKind": "custom_model_development",
    }
    for key, value in tags.items():
        store.client.set_experiment_tag(store.experiment_id, key, value)


def charts(kind: str, title: str, metrics: Iterable[str], **options: Any) -> dict[str, Any]:
    """Charts of a view in MLflow's format: a first section with one chart for each metric.

    Args:
        kind: BAR or LINE.
        options: further keys of each chart.
    """
    cards = [
        {
            "uuid": f"dualspeed-{name}",
            "type": kind,
            "metricSectionId": "dualspeed",
            "metricKey": name,
            "runsCountToCompare": 50,
            "isGenerated": False,
            "deleted": False,
            **options,
        }
        for name in metrics
    ]
    names = {"dualspeed": title} | {f"dualspeed-{name}": name for name in OTHER_SECTIONS}
    sections = [
        {"uuid": key, "name": name, "display": key == "dualspeed", "isReordered": False} for key, name in names.items()
    ]
    return {"compareRunCharts": cards, "compareRunSections": sections, "isAccordionReordered": True}
