"""How loss falls with training time, and what score it ends at: Baseline, NaivePrune and DualSpeed.

Read from what each stage leaves with its checkpoint: `metrics.jsonl` and `training.json`. Time is the trainer's own
(samples over samples per second), so that a run which waited for a machine between two jobs has no gap.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dualspeed.labels import METHOD_LABELS
from dualspeed.plot_style import COLORS, GREY, MARKERS, empty_figure
from dualspeed.results import finetune_path, read_json
from dualspeed.summary import members_of

LOSSES = {"slow/ce_loss": ("full tokens", "-"), "fast/ce_loss": ("pruned tokens", (0, (3, 1.5)))}
SMOOTHED_SHARE = 0.03


def read_curve(folder: Path) -> pd.DataFrame:
    """`seconds` of training and LOSSES at each logged step of the stage whose checkpoint is `folder`; maybe empty."""
    columns = ["step", "seconds", *LOSSES]
    training, metrics = folder / "training.json", folder / "metrics.jsonl"
    if not (training.exists() and metrics.exists()):
        return pd.DataFrame(columns=columns)
    batch = read_json(training)["settings"]["recipe"]["global_batch_size"]
    rows, step, seconds = [], 0, 0.0
    for line in metrics.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # torn by a kill, and then written again
        values = record["metrics"]
        if "samples_per_second" in values:
            seconds += (record["step"] - step) * batch / values["samples_per_second"]
            step = record["step"]
            rows.append({"step": step, "seconds": seconds} | {name: values.get(name) for name in LOSSES})
    return pd.DataFrame(rows, columns=columns)


def draw_learning_curves(settings: dict[str, Any], rows: pd.DataFrame) -> Figure:
    """Loss against training time on the left, the score at its end on the right; `rows` are those of `typical_rows`."""
    root = Path(settings["results"])
    curves = {one["id"]: read_curve(finetune_path(root, one).parent) for one in members_of(settings, rows)}
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
    left.set_yscale("log")
    left.set_ylabel("Training loss (cross-entropy)")
    left.set_title("Loss while training")
    draw_final_scores(right, rows, seconds / 3600)
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
    axes.legend(loc="center right", fontsize=9)
    baseline = known["mean"][(known["method"] == "baseline") & (known["inference"] == "full")]
    if len(baseline):
        axes.axhline(baseline.iloc[0], color=GREY, linewidth=0.8, zorder=0)
    axes.margins(x=0.25, y=0.15)
    axes.set_ylabel("Mean score")
    axes.set_title("Score when trained")
