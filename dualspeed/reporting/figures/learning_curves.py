"""Figure of the learning curves: loss and score against training time, of Baseline, NaivePrune and DualSpeed.

Read from the metrics and the training record in each checkpoint. The time of a step is its samples divided by the
logged samples per second: it leaves out validations, and the wait of an interrupted run for its next job.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dualspeed.errors import ResultsError
from dualspeed.layout import METRICS_FILE, Layout
from dualspeed.reporting.figures.style import COLORS, GREY, MARKERS, empty_figure
from dualspeed.reporting.frames import read_training
from dualspeed.reporting.summary import rows_in
from dualspeed.settings.names import METHOD_LABELS
from dualspeed.settings.sheet import Sheet
from dualspeed.tracking.metrics_file import read_metrics

LOSSES = {"slow/ce_loss": ("full tokens", "-"), "fast/ce_loss": ("pruned tokens", (0, (3, 1.5)))}
ACCURACY = "validation/answer_accuracy"
SMOOTHED_SHARE = 0.03  # window of the running mean, as a share of the curve


def read_curve(folder: Path) -> pd.DataFrame:
    """`step`, `seconds` of training and LOSSES at each logged step of the checkpoint `folder`; empty if not trained."""
    columns = ["step", "seconds", *LOSSES]
    training = read_training(folder)
    if training is None:
        return pd.DataFrame(columns=columns)
    try:
        batch = training["settings"]["recipe"]["global_batch_size"]
    except (KeyError, TypeError):
        raise ResultsError(f"{folder}: its training record has no global_batch_size; train it again") from None
    lines, step, seconds = [], 0, 0.0
    for logged in read_metrics(folder / METRICS_FILE):
        if "samples_per_second" in logged.metrics:
            seconds += (logged.step - step) * batch / logged.metrics["samples_per_second"]
            step = logged.step
            losses = {name: logged.metrics.get(name) for name in LOSSES}
            lines.append({"step": step, "seconds": seconds} | losses)
    return pd.DataFrame(lines, columns=columns)


def read_validation(folder: Path) -> pd.DataFrame:
    """`step`, `seconds` of training and ACCURACY at each validation of the checkpoint `folder`; empty without any."""
    logged = [one for one in read_metrics(folder / METRICS_FILE) if ACCURACY in one.metrics]
    points = pd.DataFrame([(one.step, one.metrics[ACCURACY]) for one in logged], columns=["step", ACCURACY])
    curve = read_curve(folder)
    if curve.empty:
        return points[:0].assign(seconds=[])
    return points.assign(seconds=np.interp(points["step"], [0, *curve["step"]], [0.0, *curve["seconds"]]))


def draw_learning_curves(sheet: Sheet, summary: pd.DataFrame) -> Figure:
    """Loss against training time on the left, the score on the right; `summary` as from `typical_rows`."""
    layout = Layout(sheet.results)
    folders = {row.id: Path(layout.model(row.id)) for row in rows_in(sheet, summary)}
    curves = {name: read_curve(folder) for name, folder in folders.items()}
    validations = {name: read_validation(folder) for name, folder in folders.items()}
    if all(curve.empty for curve in curves.values()):
        return empty_figure("Learning curves: not run, or trained without keeping metrics")
    longest = (summary["train_hours"].max() if summary["train_hours"].notna().any() else 0) * 3600
    unit, seconds = ("hours", 3600) if longest >= 3600 else ("minutes", 60)
    figure = Figure(figsize=(9.2, 3.9))
    left, right = figure.subplots(1, 2)
    on_full_tokens = summary[summary["inference"] == "full"]
    for line in on_full_tokens.itertuples():
        start = 0 if pd.isna(line.pretrain_seconds) else line.pretrain_seconds
        for number, name in enumerate(line.experiments):
            draw_losses(left, curves[name], line.method, start, seconds, labelled=number == 0)
            draw_validation(right, validations[name], line.method, start, seconds, labelled=number == 0)
    left.set_yscale("log")
    left.set_ylabel("Training loss (cross-entropy)")
    left.set_title("Loss while training")
    if any(len(points) for points in validations.values()):
        draw_final_scores(right, on_full_tokens, seconds / 3600)
        label_validation(right)
    else:
        draw_final_scores(right, summary, seconds / 3600)
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
    """Draw one run's losses as running means, in the line style of their tokens; `start` and `unit` are in seconds."""
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
    """Draw one run's accuracy on held-out data, on full tokens; `start` and `unit` are in seconds."""
    if not points.empty:
        label = METHOD_LABELS[method] if labelled else None
        time, color = (start + points["seconds"]) / unit, COLORS[method]
        axes.plot(time, points[ACCURACY], color=color, marker=".", linewidth=1.2, label=label)


def label_validation(axes: Axes) -> None:
    """Add titles, and a legend of the curves; markers have the methods' colours."""
    lines = [line for line in axes.get_lines() if str(line.get_label()) in METHOD_LABELS.values()]
    end = Line2D([], [], color=GREY, marker="o", linestyle="none", markersize=8, label="Benchmarks' mean, when trained")
    axes.legend(handles=[*lines, end], loc="center right", fontsize=9)
    axes.set_ylim(0, 105)
    axes.margins(x=0.1)
    axes.set_title("Score while training, on full tokens")
    axes.set_ylabel("Right answers on held-out data (%)")


def draw_final_scores(axes: Axes, summary: pd.DataFrame, unit_hours: float) -> None:
    """Draw each line's mean score at its training time: filled markers for full tokens, hollow ones for pruned."""
    known = summary[summary["mean"].notna() & summary["train_hours"].notna()]
    for line in known.itertuples():
        is_full = line.inference == "full"
        axes.errorbar(
            line.train_hours / unit_hours,
            line.mean,
            yerr=np.nan_to_num(line.mean_std),
            color=COLORS[line.method],
            marker=MARKERS[line.method],
            markersize=13 if line.method == "baseline" else 8,
            markerfacecolor=COLORS[line.method] if is_full else "white",
            capsize=2,
            linestyle="none",
            label=f"{METHOD_LABELS[line.method]}, {'full' if is_full else 'pruned'} tokens",
        )
    baseline = known["mean"][(known["method"] == "baseline") & (known["inference"] == "full")]
    if len(baseline):
        axes.axhline(baseline.iloc[0], color=GREY, linewidth=0.8, zorder=0)
