"""Reader of a sheet's results: one tidy frame for each kind of number; all tables and figures are made from them.

Reads the scores (one JSON file for each row, inference and benchmark), the step times, and the training record of each
checkpoint. A score that doesn't exist yet has no line in `scores`, `detail` and `types`; `speed` and `costs` have a
line for every row of the sheet, with empty cells.
"""

import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dualspeed.errors import ResultsError
from dualspeed.evaluation.bootstrap import Cell, resample_scores
from dualspeed.files import write_atomic
from dualspeed.layout import TRAINING_RECORD, Layout
from dualspeed.reporting.speedup import speedup_measured, speedup_theory
from dualspeed.settings.names import in_paper_order
from dualspeed.settings.sheet import Row, Sheet

IDENTITY = ["experiment", "model", "method", "pruner", "pruning_ratio", "slow_mode_ratio", "seed"]
LENGTH = ["slow_steps", "max_steps"]
INFERENCE = ["inference", "inference_pruner", "inference_pruning_ratio"]
SCORE_COLUMNS = [*IDENTITY, *INFERENCE, "benchmark", "metric", "score", "num_questions", *LENGTH]
DETAIL_COLUMNS = ["experiment", "inference", "benchmark", "metric", "value"]
TYPE_COLUMNS = ["experiment", "inference", "benchmark", "question_type", "accuracy", "num_questions"]
STEP_COLUMNS = ["fast_step_seconds", "slow_step_seconds", "baseline_step_seconds"]
SPEED_COLUMNS = [
    *["experiment", "method", "pruner", "pruning_ratio", "slow_mode_ratio", "seed", "train_seconds"],
    *[*STEP_COLUMNS, "speedup_measured", "speedup_theory", *LENGTH],
]
COST_COLUMNS = [
    *["experiment", "pretrain", "pretrain_seconds", "finetune_seconds", "train_hours"],
    *["samples_per_second", "peak_memory_bytes", "pruner_share", "fast_flops_share", "gpu_hours"],
]
TUPLE_COLUMNS = ["experiments", "not_run"]  # of a summary; joined to text in a csv file

# Fields that are read of each kind of file, with their type; a file may have more.
SCORE_FIELDS: dict[str, type] = {
    **{"checksum": str, "metric": str, "score": float, "percent_metric": str, "percent": float},
    **{"num_questions": int, "num_missing": int, "metrics": dict, "statistics": list},
}
TRAINING_FIELDS: dict[str, type] = {"train_seconds": float, "samples_per_second": float, "peak_memory_bytes": float}
SPEED_FIELDS: dict[str, type] = dict.fromkeys([*STEP_COLUMNS, "pruner_seconds", "theory_u"], float)


@dataclass(frozen=True)
class Results:
    """All results of a sheet so far; the columns of each frame are listed at the top of this module."""

    sheet: Sheet
    """Sheet whose results these are."""
    scores: pd.DataFrame
    """Score in percent of each row, inference and benchmark."""
    detail: pd.DataFrame
    """Every metric of each score."""
    types: pd.DataFrame
    """Accuracy of each score by type of question."""
    speed: pd.DataFrame
    """Step times and speedup of each row."""
    costs: pd.DataFrame
    """Time, memory and FLOPs of each row's training."""
    headlines: pd.DataFrame
    """Metrics that papers report and that are no percentage, MME's points of perception; columns as in `detail`."""
    draws: dict[Cell, np.ndarray]
    """Score in percent of each cell, (1 + RESAMPLES,): on the real questions, then on each bootstrap draw of them."""

    @property
    def benchmarks(self) -> list[str]:
        """The sheet's benchmarks in the order of the paper's columns."""
        return in_paper_order(self.sheet.benchmarks)

    @property
    def layout(self) -> Layout:
        """Paths of the sheet's results."""
        return Layout(self.sheet.results)


def read_results(sheet: Sheet) -> Results:
    """Read all results of a sheet that exist so far.

    Raises:
        ResultsError: a file is broken, or its score is of other questions than the other rows' scores.
    """
    layout = Layout(sheet.results)
    scores, detail, types, headlines, statistics = [], [], [], [], {}
    checksums: dict[str, str] = {}
    for row, inference, benchmark in _cells(sheet):
        path = Path(layout.score(row.id, inference, benchmark))
        if not path.exists():
            continue
        content = read_fields(path, SCORE_FIELDS)
        if checksums.setdefault(benchmark, content["checksum"]) != content["checksum"]:
            raise ResultsError(f"{path}: scored on another question file than the other experiments; score it again")
        key = (row.id, inference, benchmark)
        scores.append(_score_line(sheet, row, inference, benchmark, content))
        detail += [(*key, metric, value) for metric, value in _all_metrics(content).items()]
        if content["metric"] != content["percent_metric"]:
            headlines.append((*key, content["metric"], content["score"]))
        kinds = content.get("by_category", {}).items()
        types += [(*key, kind, values["accuracy"], values["num_questions"]) for kind, values in kinds]
        statistics[key] = _statistics(path, content)
    _check_units(layout, statistics)
    return Results(
        sheet=sheet,
        scores=pd.DataFrame(scores, columns=SCORE_COLUMNS),
        detail=pd.DataFrame(detail, columns=DETAIL_COLUMNS),
        types=pd.DataFrame(types, columns=TYPE_COLUMNS),
        headlines=pd.DataFrame(headlines, columns=DETAIL_COLUMNS),
        speed=pd.DataFrame([_speed_line(layout, row) for row in sheet.rows], columns=SPEED_COLUMNS),
        costs=pd.DataFrame([_cost_line(layout, row) for row in sheet.rows], columns=COST_COLUMNS),
        draws=resample_scores(statistics),
    )


def write_frames(results: Results, out: Path) -> None:
    """Write scores.csv, scores_detail.csv, scores_by_type.csv, speed.csv and costs.csv under `out`."""
    frames = {"scores": results.scores, "scores_detail": results.detail, "scores_by_type": results.types}
    frames |= {"speed": results.speed, "costs": results.costs}
    for name, frame in frames.items():
        write_atomic(out / f"{name}.csv", to_csv(frame))


def to_csv(frame: pd.DataFrame) -> str:
    """CSV text: numbers with at most 10 digits, so 0.9 instead of 0.90000001; tuples joined; missing values empty."""
    texts = {name: frame[name].map("; ".join, na_action="ignore") for name in TUPLE_COLUMNS if name in frame}
    return frame.assign(**texts).to_csv(index=False, float_format="%.10g", lineterminator="\n")


def training_folders(layout: Layout, row: Row) -> dict[str, Path]:
    """Checkpoint folder of each of a row's stages: pretrain, unless it starts from the base model, and finetune."""
    pretrain = {"pretrain": Path(layout.pretraining(row.pretrain_key))} if row.pretrain_key else {}
    return pretrain | {"finetune": Path(layout.model(row.id))}


def read_training(folder: Path) -> dict[str, Any] | None:
    """Training record of a checkpoint; None before the stage has finished."""
    path = folder / TRAINING_RECORD
    return read_fields(path, TRAINING_FIELDS) if path.exists() else None


def read_fields(path: Path, fields: Mapping[str, type]) -> dict[str, Any]:
    """The JSON object in a file, with at least these fields; ResultsError names the file and what is wrong with it."""
    again = "delete it to have it made again"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResultsError(f"{path}: not valid JSON ({error}); {again}") from error
    if not isinstance(content, dict):
        raise ResultsError(f"{path}: no JSON object; {again}")
    for name, kind in fields.items():
        valid = (int, float) if kind is float else (kind,)
        if not isinstance(content.get(name), valid):
            raise ResultsError(f"{path}: field {name!r} is missing or no {kind.__name__}; {again}")
    if wrong := next(_not_finite({name: content[name] for name in fields if name != "statistics"}), None):
        raise ResultsError(f"{path}: field {wrong[0]!r} is {wrong[1]}; valid: a finite number; {again}")
    return content


def _not_finite(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(name, what it is) of each number in a JSON value that a table can't show: NaN, inf, or too large for one."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _not_finite(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _not_finite(item, f"{name}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield name, str(value)
    elif isinstance(value, int) and abs(value) > sys.float_info.max:
        yield name, "too large"


def _cells(sheet: Sheet) -> list[tuple[Row, str, str]]:
    return [
        (row, inference, benchmark)
        for row in sheet.rows
        for inference in row.inferences
        for benchmark in sheet.benchmarks
    ]


def _identity(row: Row) -> dict[str, Any]:
    prunes = row.method != "baseline"
    return {
        "experiment": row.id,
        "model": row.model,
        "method": row.method,
        "pruner": row.dualspeed.pruner if prunes else None,
        "pruning_ratio": row.dualspeed.pruning_ratio if prunes else None,
        **row.slow_settings,
        "max_steps": row.max_steps,
        "seed": row.seed,
    }


def _score_line(sheet: Sheet, row: Row, inference: str, benchmark: str, content: dict[str, Any]) -> dict[str, Any]:
    # A Baseline is trained without a pruner; its pruned inference uses the configuration's.
    pruned = sheet.inference if row.method == "baseline" else row.dualspeed
    return _identity(row) | {
        "inference": inference,
        "inference_pruner": pruned.pruner if inference == "pruned" else None,
        "inference_pruning_ratio": pruned.pruning_ratio if inference == "pruned" else None,
        "benchmark": benchmark,
        "metric": content["percent_metric"],
        "score": content["percent"],
        "num_questions": content["num_questions"],
    }


def _all_metrics(content: dict[str, Any]) -> dict[str, float]:
    return content["metrics"] | {"num_questions": content["num_questions"], "num_missing": content["num_missing"]}


def _statistics(path: Path, content: dict[str, Any]) -> np.ndarray:
    """(units, m) whose sums over units the percentage is a function of."""
    try:
        values = np.asarray(content["statistics"], dtype=float)
    except ValueError as error:
        raise ResultsError(f"{path}: field 'statistics' is no table of numbers ({error}); score it again") from error
    if values.ndim != 2 or not len(values) or not np.isfinite(values).all():
        raise ResultsError(f"{path}: field 'statistics' is no table of numbers, all finite; score it again")
    return values


def _check_units(layout: Layout, statistics: Mapping[Cell, np.ndarray]) -> None:
    """Raise ResultsError unless all scores of a benchmark have statistics of the same shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for (row, inference, benchmark), values in statistics.items():
        expected = shapes.setdefault(benchmark, values.shape)
        if values.shape != expected:
            path = layout.score(row, inference, benchmark)
            raise ResultsError(f"{path}: statistics of shape {values.shape}, others have {expected}; score it again")


def _speed_line(layout: Layout, row: Row) -> dict[str, Any]:
    line = _identity(row) | _read_times(layout, row)
    training = read_training(training_folders(layout, row)["finetune"])
    line["train_seconds"] = training["train_seconds"] if training else None
    method = row.dualspeed
    if row.method == "baseline":
        line |= {"speedup_measured": 1.0, "speedup_theory": 1.0}
    elif "theory_u" in line and (training or method.slow_steps is None):
        share = method.slow_share(training["num_steps"]) if training and method.slow_steps else method.slow_mode_ratio
        line["speedup_measured"] = speedup_measured(line, share)
        line["speedup_theory"] = speedup_theory(line["theory_u"], share, method.distillation_weight)
    return line


def _read_times(layout: Layout, row: Row) -> dict[str, float]:
    """Step times of a row; empty if not measured yet, and for a Baseline."""
    path = Path(layout.speed(row.speed_key)) if row.speed_key else None
    if path is None or not path.exists():
        return {}
    times = read_fields(path, SPEED_FIELDS)
    for name in (*STEP_COLUMNS, "theory_u"):
        if times[name] <= 0:
            valid = "valid: above 0; delete it to have it made again"
            raise ResultsError(f"{path}: field {name!r} is {times[name]}; {valid}")
    return times


def _cost_line(layout: Layout, row: Row) -> dict[str, Any]:
    line: dict[str, Any] = {"experiment": row.id, "pretrain": row.pretrain_key}
    folders = training_folders(layout, row)
    for stage, folder in folders.items():
        training = read_training(folder)
        if training is None:
            continue
        line[f"{stage}_seconds"] = training["train_seconds"]
        if training.get("device", "cpu") != "cpu":
            line[f"{stage}_gpu_hours"] = training["train_seconds"] * training["num_processes"] / 3600
        if stage == "finetune":
            line["samples_per_second"] = training["samples_per_second"]
            line["peak_memory_bytes"] = training["peak_memory_bytes"]
    if all(f"{stage}_seconds" in line for stage in folders):
        line["train_hours"] = sum(line[f"{stage}_seconds"] for stage in folders) / 3600
        if "finetune_gpu_hours" in line:
            line["gpu_hours"] = line.get("pretrain_gpu_hours", 0.0) + line["finetune_gpu_hours"]
    times = _read_times(layout, row)
    if times:
        line["pruner_share"] = times["pruner_seconds"] / times["fast_step_seconds"]
        line["fast_flops_share"] = times["theory_u"]
    return line
