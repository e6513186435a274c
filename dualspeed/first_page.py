"""What MLflow's page of an experiment shows first: which run is best, and what did it cost?

MLflow shows names and times of every run, newest first. A view of its own format, kept as a tag of the experiment,
shows one line for each row of the sheet instead, best first, with its settings, scores, speed and cost; the page's note
links to it. A reader's own choice of columns is not touched.
"""

import json
from collections.abc import Iterable

from dualspeed.mlflow_store import Store

VIEW = "best"
TITLE = "Which run is best, and what did it cost?"
SETTINGS = ("method", "pruner", "p", "r", "seed")
# In the order of importance; those that no run has are left out, as GPU hours of the demo.
METRICS = ("score/mean", "rel", "speedup_measured", "train_hours", "gpu_hours", "peak_memory_bytes")


def view_path(experiment_id: str) -> str:
    """Where the view is, behind the address of the server."""
    return f"#/experiments/{experiment_id}/runs?viewStateShareKey={VIEW}"


def arrange(store: Store, metrics: Iterable[str]) -> None:
    """Give the experiment its view, with those of METRICS that are among the `metrics` of its rows, and its note."""
    shown = [name for name in METRICS if name in set(metrics)]
    view = {
        "searchFilter": "tags.kind = 'experiment'",
        "orderByKey": "metrics.`score/mean`",
        "orderByAsc": False,
        "selectedColumns": [f"metrics.`{name}`" for name in shown] + [f"params.`{name}`" for name in SETTINGS],
    }
    note = (
        f"**[{TITLE}]({view_path(store.experiment_id)})**\n\n"
        "One run for each row of the sheet of experiments, with its scores, speed and cost; under it the runs of its "
        "training and of each benchmark. A pretraining that rows share is a run of its own, named in their tag "
        "`pretrain_run_id`. Tables and figures of a sheet are artifacts of the run `tables of <sheet>`.\n\n"
        "`score/mean`: mean over the benchmarks on full tokens, in percent. `rel`: score relative to the Baseline of "
        "the same seed, in percent, `rel_low` and `rel_high` its 95 % interval. `speedup_measured`: time of a step, "
        "Baseline over this run. `train_hours`: pretraining and finetuning, wall clock."
    )
    tags = {
        f"mlflow.sharedViewState.{VIEW}": json.dumps(view),
        "mlflow.note.content": note,
        "mlflow.experimentKind": "custom_model_development",
    }
    for key, value in tags.items():
        store.client.set_experiment_tag(store.experiment_id, key, value)
