"""The results tree of a sheet, read into tidy frames that all tables and figures are made from.

Enters: the sheet's settings and what has been written so far of results/scores (METRICS.json of each experiment,
inference and benchmark), results/speed, and `training.json` of each checkpoint. Leaves: one row per experiment,
inference and benchmark (`scores`), per metric of those (`detail`), per type of question (`types`), and per experiment
(`speed`, `costs`). What has not run is absent from the first three, and empty in the other two.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dualspeed.errors import ResultsError
from dualspeed.files import write_atomic

IDENTITY = ["experiment", "model", "method", "pruner", "pruning_ratio", "slow_mode_ratio", "seed"]
INFERENCE = ["inference", "inference_pruner", "inference_pruning_ratio"]
SCORE_COLUMNS = [*IDENTITY, *INFERENCE, "benchmark", "metric", "score", "num_questions"]
DETAIL_COLUMNS = ["experiment", "inference", "benchmark", "metric", "value"]
TYPE_COLUMNS = ["experiment", "inference", "benchmark", "question_type", "accuracy", "num_questions"]
STEP_COLUMNS = ["fast_step_seconds", "slow_step_seconds", "baseline_step_seconds"]
SPEED_COLUMNS = [
    *["experiment", "method", "pruner", "pruning_ratio", "slow_mode_ratio", "seed", "train_seconds"],
    *[*STEP_COLUMNS, "speedup_measured", "speedup_theory"],
]
COST_COLUMNS = [
    *["experiment", "pretrain", "pretrain_seconds", "finetune_seconds", "train_hours"],
    *["samples_per_second", "peak_memory_bytes", "pruner_share", "fast_flops_share", "gpu_hours"],
]


@dataclass(frozen=True)
class Results:
    """What a sheet's experiments have given so far; the columns of each frame are listed at the top of this module."""

    scores: pd.DataFrame
    detail: pd.DataFrame
    types: pd.DataFrame
    speed: pd.DataFrame
    costs: pd.DataFrame
    headlines: pd.DataFrame
    """What papers report of those benchmarks whose headline is no percentage: MME's points of perception."""
    statistics: dict[tuple[str, str, str], np.ndarray]
    """(experiment, inference, benchmark) -> (units, m): what the percentage is a function of, summed over units."""


def read_results(settings: dict[str, Any]) -> Results:
    """Read what there is of a sheet. Raises ValueError naming a file that is broken or scored on other questions."""
    root = Path(settings["results"])
    scores, detail, types, headlines, statistics = [], [], [], [], {}
    checksums: dict[str, str] = {}
    for experiment, inference, benchmark in _cells(settings):
        path = score_path(root, experiment["id"], inference, benchmark)
        if not path.exists():
            continue
        content = read_json(path)
        if checksums.setdefault(benchmark, content["checksum"]) != content["checksum"]:
            raise ResultsError(f"{path}: scored on another question file than the other experiments; score it again")
        key = (experiment["id"], inference, benchmark)
        scores.append(_score_row(settings, experiment, inference, benchmark, content))
        detail += [(*key, metric, value) for metric, value in _all_metrics(content).items()]
        if content["metric"] != content["percent_metric"]:
            headlines.append((*key, content["metric"], content["score"]))
        kinds = content.get("by_category", {}).items()
        types += [(*key, kind, values["accuracy"], values["num_questions"]) for kind, values in kinds]
        statistics[key] = np.asarray(content["statistics"], dtype=float)
    return Results(
        scores=pd.DataFrame(scores, columns=SCORE_COLUMNS),
        detail=pd.DataFrame(detail, columns=DETAIL_COLUMNS),
        types=pd.DataFrame(types, columns=TYPE_COLUMNS),
        headlines=pd.DataFrame(headlines, columns=DETAIL_COLUMNS),
        speed=pd.DataFrame([_speed_row(root, one) for one in settings["experiments"]], columns=SPEED_COLUMNS),
        costs=pd.DataFrame([_cost_row(root, one) for one in settings["experiments"]], columns=COST_COLUMNS),
        statistics=statistics,
    )


def write_frames(results: Results, out: Path) -> None:
    """Write scores.csv, scores_detail.csv, scores_by_type.csv, speed.csv and costs.csv under `out`."""
    frames = {"scores": results.scores, "scores_detail": results.detail, "scores_by_type": results.types}
    frames |= {"speed": results.speed, "costs": results.costs}
    for name, frame in frames.items():
        write_atomic(Path(out) / f"{name}.csv", to_csv(frame))


def to_csv(frame: pd.DataFrame) -> str:
    """CSV text with numbers as a person writes them: 0.9, not 0.90000001; what is missing is empty."""
    return frame.to_csv(index=False, float_format="%.10g", lineterminator="\n")


def score_path(root: Path, experiment: str, inference: str, benchmark: str) -> Path:
    """Where the scores of one experiment, inference and benchmark lie."""
    return root / "scores" / experiment / inference / f"{benchmark}.json"


def finetune_path(root: Path, experiment: dict[str, Any]) -> Path:
    """Where an experiment's finetuning says how it went."""
    return root / "models" / experiment["id"] / "training.json"


def training_path(root: Path, experiment: dict[str, Any], stage: str) -> Path | None:
    """Where a stage of an experiment says how it went; None if its model has no such stage."""
    if stage == "finetune":
        return finetune_path(root, experiment)
    return root / "pretrain" / experiment["pretrain_key"] / "training.json" if experiment["pretrain_key"] else None


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file. Raises ValueError with its name if it is broken."""
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path}: not valid JSON ({error}); delete it to have it made again") from error


def speedup_measured(times: dict[str, float], slow_mode_ratio: float) -> float:
    """How many times faster than Baseline a run's steps are, from the median seconds of a step in each mode."""
    mean_step = (1 - slow_mode_ratio) * times["fast_step_seconds"] + slow_mode_ratio * times["slow_step_seconds"]
    return times["baseline_step_seconds"] / mean_step


def speedup_theory(fast_share: float, slow_mode_ratio: float, distillation_weight: float) -> float:
    """The limit set by arithmetic: a fast step costs `fast_share` of a full one in FLOPs.

    A slow step costs one full step and, where a teacher runs (a forward pass without gradient, a third of a step on
    pruned tokens), fast_share / 3.
    """
    slow = 1 + fast_share / 3 if distillation_weight > 0 else 1.0
    return 1 / ((1 - slow_mode_ratio) * fast_share + slow_mode_ratio * slow)


def _cells(settings: dict[str, Any]) -> list[tuple[dict[str, Any], str, str]]:
    return [
        (experiment, inference, benchmark)
        for experiment in settings["experiments"]
        for inference in experiment["inferences"]
        for benchmark in settings["benchmarks"]
    ]


def _identity(experiment: dict[str, Any]) -> dict[str, Any]:
    config = experiment["dualspeed"]
    prunes = experiment["method"] != "baseline"
    return {
        "experiment": experiment["id"],
        "model": experiment["model"],
        "method": experiment["method"],
        "pruner": config["pruner"] if prunes else None,
        "pruning_ratio": config["pruning_ratio"] if prunes else None,
        "slow_mode_ratio": config["slow_mode_ratio"],
        "seed": experiment["seed"],
    }


def _score_row(
    settings: dict[str, Any], experiment: dict[str, Any], inference: str, benchmark: str, content: dict[str, Any]
) -> dict[str, Any]:
    # A Baseline was trained without a pruner; pruned, it answers with the one that the configuration names.
    pruned = settings["inference"] if experiment["method"] == "baseline" else experiment["dualspeed"]
    return _identity(experiment) | {
        "inference": inference,
        "inference_pruner": pruned["pruner"] if inference == "pruned" else None,
        "inference_pruning_ratio": pruned["pruning_ratio"] if inference == "pruned" else None,
        "benchmark": benchmark,
        "metric": content["percent_metric"],
        "score": content["percent"],
        "num_questions": content["num_questions"],
    }


def _all_metrics(content: dict[str, Any]) -> dict[str, float]:
    return content["metrics"] | {"num_questions": content["num_questions"], "num_missing": content["num_missing"]}


def _speed_row(root: Path, experiment: dict[str, Any]) -> dict[str, Any]:
    row = _identity(experiment) | _read_times(root, experiment)
    training = finetune_path(root, experiment)
    row["train_seconds"] = read_json(training)["train_seconds"] if training.exists() else None
    config = experiment["dualspeed"]
    if experiment["method"] == "baseline":
        row |= {"speedup_measured": 1.0, "speedup_theory": 1.0}
    elif "theory_u" in row:
        row["speedup_measured"] = speedup_measured(row, config["slow_mode_ratio"])
        row["speedup_theory"] = speedup_theory(
            row["theory_u"], config["slow_mode_ratio"], config["distillation_weight"]
        )
    return row


def _read_times(root: Path, experiment: dict[str, Any]) -> dict[str, float]:
    """The experiment's step times; empty where they were not measured, as for a Baseline, which is the measure."""
    path = root / "speed" / f"{experiment['speed_key']}.json"
    return read_json(path) if experiment["speed_key"] and path.exists() else {}


def _cost_row(root: Path, experiment: dict[str, Any]) -> dict[str, Any]:
    row = {"experiment": experiment["id"], "pretrain": experiment["pretrain_key"]}
    for stage in ("pretrain", "finetune"):
        path = training_path(root, experiment, stage)
        if path is None or not path.exists():
            continue
        training = read_json(path)
        row[f"{stage}_seconds"] = training["train_seconds"]
        if training.get("device", "cpu") != "cpu":
            row[f"{stage}_gpu_hours"] = training["train_seconds"] * training["num_processes"] / 3600
        if stage == "finetune":
            row["samples_per_second"] = training["samples_per_second"]
            row["peak_memory_bytes"] = training["peak_memory_bytes"]
    seconds = [row.get(f"{stage}_seconds") for stage in ("pretrain", "finetune")]
    if seconds[1] is not None and (seconds[0] is not None or not experiment["pretrain_key"]):
        row["train_hours"] = sum(filter(None, seconds)) / 3600
        if "finetune_gpu_hours" in row:
            row["gpu_hours"] = row.get("pretrain_gpu_hours", 0.0) + row["finetune_gpu_hours"]
    times = _read_times(root, experiment)
    if times:
        row["pruner_share"] = times["pruner_seconds"] / times["fast_step_seconds"]
        row["fast_flops_share"] = times["theory_u"]
    return row
