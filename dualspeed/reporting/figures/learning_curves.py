"""How loss falls and the score rises with training time: Baseline, NaivePrune and DualSpeed.

Read from what each stage leaves with its checkpoint: `metrics.jsonl` and `training.json`. Time is the trainer's own
(samples over samples per second), so that a run which waited for a machine between two jobs has no gap; validations
take none of it.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dualspeed.reporting.figures.style import COLORS, GREY, MARKERS, empty_figure
from dualspeed.reporting.frames import finetune_path, read_json
from dualspeed.reporting.summary import members_of
from dualspeed.settings.names import METHOD_LABELS

LOSSES = {"slow/ce_loss": ("full tokens", "-"), "fast/ce_loss": ("pruned tokens", (0, (3, 1.5)))}
ACCURACY = "validation/answer_accuracy"
SMOOTHED_SHARE = 0.03


def read_curve(folder: Path) -> pd.DataFrame:
    """`seconds` of training and LOSSES at each logged step of the stage whose checkpoint is `folder`; maybe empty."""
    columns = ["step", "seconds", *LOSSES]
    training = folder / "training.json"
    if not training.exists():
        return pd.DataFrame(columns=columns)
    batch = read_json(training)["settings"]["recipe"]["global_batch_size"]
    rows, step, seconds = [], 0, 0.0
    for record in read_metrics(folder):
        values = record["metrics"]
        if "samples_per_second" in values:
            seconds += (record["step"] - step) * batch / values["samples_per_second"]
            step = record["step"]
            rows.append({"step": step, "seconds": seconds} | {name: values.get(name) for name in LOSSES})
    return pd.DataFrame(rows, columns=columns)


def read_validation(folder: Path) -> pd.DataFrame:
    """`seconds` of training and ACCURACY at each validation of the stage whose checkpoint is `folder`; maybe empty."""
    found = [(one["step"], one["metrics"][ACCURACY]) for one in read_metrics(folder) if ACCURACY in one["metrics"]]
    points, curve = pd.DataFrame(found, columns=["step", ACCURACY]), read_curve(folder)
    if curve.empty:
        return points[:0].assign(seconds=[])
    return points.assign(seconds=np.interp(points["step"], [0, *curve["step"]], [0.0, *curve["seconds"]]))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines of the folder's metrics.jsonl; none if it has no such file."""
    file, records = folder / "metrics.jsonl", []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # torn by a kill, and then written again
    return records


def draw_learning_curves(settings: dict[str, Any], rows: pd.DataFrame) -> Figure:
    """Loss against training time on the left, the score on the right; `rows` are those of `typical_rows`."""
    root = Path(settings["results"])
    folders = {one["id"]: finetune_path(root, one).parent for one in members_of(settings, rows)}
    curves = {name: read_curve(folder) for name, folder in folders.items()}
    validations = {name: read_validation(folder) for name, folder in folders.items()}
    if all(curve.empty for curve in curves.values()):
        return empty_figure("Learning curves: not run, or trained without keeping metrics")
    longest = (rows["train_hours"].max() if rows["train_hours"].notna().any() else 0) * 3600
    unit, seconds = ("hours", 3600) if longest >= 3600 else ("minutes", 60)
    figure = Figure(figsize=(9.2, 3.9))
    left, right = figure.subplots(1, 2)
    for row in rows[rows["inference"] == "full"].itertuples():
        start = 0 if pd.isna(row.pretrain_seconds) else row.pretrain_seconds
        for number, name in enumerate(row.experiments.split("; ")):
            draw_losses(left, curves[name], row.method, start, seconds, labelled=number == 0)
            draw_validation(right, validations[name], row.method, start, seconds, labelled=number == 0)
    left.set_yscale("log")
    left.set_ylabel("Training loss (cross-entropy)")
    left.set_title("Loss while training")
    if any(len(points) for points in validations.values()):
        draw_final_scores(right, rows[rows["inference"] == "full"], seconds / 3600)
        label_validation(right)
    else:
        draw_final_scores(right, rows, seconds / 3600)
        right.legend(loc="center right", fontsize=9)
        right.margins(x=0.25, y=0.15)
        right.set_title("Score when trained")
        right.set_ylabel("Mean score")
    for axes in (left, right):
        axes.set_xlabel(f"Training time, pretraining included ({unit})")
        axes.set_xlim(left=0)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    return figure


def draw_losses(axes: Axes, curve: pd.DataFrame, method: str, start: float, unit: float, labelled: bool) -> None:
    """One run's losses, each in its mode's line style; smoothed, for a batch's loss is noisy."""
    for name, (tokens, line) in LOSSES.items():
        known = curve[curve[name].notna()]
        if known.empty:
            continue
        window = max(1, round(SMOOTHED_SHARE * len(curve)))
        smooth = known[name].astype(float).rolling(window, min_periods=1).mean()
        label = f"{METHOD_LABELS[method]}, {tokens}" if labelled else None
        axes.plot(
            (start + known["seconds"]) / unit, smooth, color=COLORS[method], linestyle=line, linewidth=1.2, label=label
        )


def draw_validation(axes: Axes, points: pd.DataFrame, method: str, start: float, unit: float, labelled: bool) -> None:
    """One run's share of held-out answers that were right, on full tokens, after so much training."""
    if not points.empty:
        label = METHOD_LABELS[method] if labelled else None
        time, color = (start + points["seconds"]) / unit, COLORS[method]
        axes.plot(time, points[ACCURACY], color=color, marker=".", linewidth=1.2, label=label)


def label_validation(axes: Axes) -> None:
    """Titles, and a legend of the curves; markers have the methods' colours."""
    lines = [line for line in axes.get_lines() if str(line.get_label()) in METHOD_LABELS.values()]
    end = Line2D([], [], color=GREY, marker="o", linestyle="none", markersize=8, label="Benchmarks' mean, when trained")
    axes.legend(handles=[*lines, end], loc="center right", fontsize=9)
    axes.set_ylim(0, 105)
    axes.margins(x=0.1)
    axes.set_title("Score while training, on full tokens")
    axes.set_ylabel("Right answers on held-out data (%)")


def draw_final_scores(axes: Axes, rows: pd.DataFrame, unit_hours: float) -> None:
    """Mean score of each way of training at the time it took: filled on full tokens, hollow on pruned ones."""
    known = rows[rows["mean"].notna() & rows["train_hours"].notna()]
    for row in known.itertuples():
        is_full = row.inference == "full"
        axes.errorbar(
            row.train_hours / unit_hours,
            row.mean,
            yerr=np.nan_to_num(row.mean_std),
            color=COLORS[row.method],
            marker=MARKERS[row.method],
            markersize=13 if row.method == "baseline" else 8,
            markerfacecolor=COLORS[row.method] if is_full else "white",
            capsize=2,
            linestyle="none",
            label=f"{METHOD_LABELS[row.method]}, {'full' if is_full else 'pruned'} tokens",
        )
    baseline = known["mean"][(known["method"] == "baseline") & (known["inference"] == "full")]
    if len(baseline):
        axes.axhline(baseline.iloc[0], color=GREY, linewidth=0.8, zorder=0)
