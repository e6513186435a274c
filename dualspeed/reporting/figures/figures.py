"""The paper's figures, and more, from the same summaries as the tables.

Missing results are left out; a figure without any result says so. The kept tokens have a module and a command of their
own (kept_tokens.py), since they need a model.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dualspeed.reporting.figures.learning_curves import draw_learning_curves
from dualspeed.reporting.figures.question_types import draw_question_types
from dualspeed.reporting.figures.style import (
    COLORS,
    DARK,
    GREY,
    LIGHT,
    MARKERS,
    ORANGE,
    empty_figure,
    styled,
    write_figure,
)
from dualspeed.reporting.frames import read_results
from dualspeed.reporting.summary import (
    has_setting,
    is_baseline,
    slow_steps_of,
    summarise,
    summarise_table,
    typical_rows,
    usual_settings,
    varied_settings,
)
from dualspeed.reporting.table_format import format_number
from dualspeed.settings.names import METHOD_LABELS, PRUNER_LABELS
from dualspeed.settings.sheet import Sheet


def write_figures(sheet: Sheet, out: Path) -> None:
    """Write every figure of a sheet as .png and .svg under `out`.

    Raises:
        ResultsError: a result is broken, or its score is of other questions than the other rows' scores.
    """
    results = read_results(sheet)
    typical = typical_rows(summarise_table(results, "table1"))
    with styled():
        drawn = {
            "figure4": draw_training_time(summarise_table(results, "figure4")),
            "figure5": draw_trade_off(summarise_table(results, "figure5")),
            "figure_mismatch": draw_mismatch(summarise_table(results, "table2")),
            "figure_speedup": draw_speedup(summarise(results, sheet.rows)),
            "figure_question_types": draw_question_types(results, typical),
            "figure_learning_curves": draw_learning_curves(sheet, typical),
        }
        for name, figure in drawn.items():
            write_figure(figure, Path(out) / name)


def draw_training_time(rows: pd.DataFrame) -> Figure:
    """Figure 4: time of pretraining and finetuning of each line, and how many times shorter than the Baseline's."""
    rows = rows[(rows["inference"] == "full") & rows["finetune_seconds"].notna()]
    if rows.empty:
        return empty_figure("Training time: not run")
    unit, seconds = ("hours", 3600) if rows["finetune_seconds"].max() >= 3600 else ("minutes", 60)
    pretrain, finetune = rows["pretrain_seconds"].fillna(0) / seconds, rows["finetune_seconds"] / seconds
    figure = Figure(figsize=(7.2, 1.3 + 0.42 * len(rows)))
    axes = figure.subplots()
    axes.barh(range(len(rows)), pretrain, color=LIGHT, edgecolor="white", label="Pretraining")
    axes.barh(range(len(rows)), finetune, left=pretrain, color=DARK, edgecolor="white", label="Finetuning")
    axes.set_yticks(range(len(rows)), name_rows(rows))
    axes.invert_yaxis()
    totals = list(pretrain + finetune)
    references = {row.model: total for row, total in zip(rows.itertuples(), totals, strict=True) if is_baseline(row)}
    for place, (row, total) in enumerate(zip(rows.itertuples(), totals, strict=True)):
        faster = "" if is_baseline(row) or row.model not in references else f" ({references[row.model] / total:.2f}x)"
        axes.text(total, place, f" {total:.1f}{faster}", va="center", fontsize=9)
    axes.set_xlim(0, 1.2 * max(totals))
    axes.set_xlabel(f"Wall clock ({unit})")
    axes.set_title("Training time (and how many times shorter than Baseline's)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def draw_trade_off(rows: pd.DataFrame) -> Figure:
    """Figure 5: Rel. against measured speedup, over p at the usual r and over r at the usual p, for each model."""
    has_ratio = np.isfinite(rows["rel"].astype(float))
    rows = rows[(rows["inference"] == "full") & has_ratio & rows["speedup_measured"].notna()]
    models = list(dict.fromkeys(rows["model"][rows["method"] == "dualspeed"]))
    if not models:
        return empty_figure("Speed against performance: not run, or the Baseline scored 0")
    figure = Figure(figsize=(9.2, 0.6 + 3.5 * len(models)))
    panels = figure.subplots(len(models), 2, sharex="row", sharey="row", squeeze=False)
    for model, (left, right) in zip(models, panels, strict=True):
        draw_panels(left, right, rows[rows["model"] == model], f"{model}: " if len(models) > 1 else "")
    for axes in panels[-1]:
        axes.set_xlabel("Measured speedup of a training step")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def draw_panels(left: Axes, right: Axes, rows: pd.DataFrame, prefix: str) -> None:
    """Draw the two panels of one model; each varies one setting and keeps the others at their usual values."""
    usual = usual_settings(rows)
    is_baseline, same_pruner = rows["method"] == "baseline", rows["pruner"] == usual["pruner"]
    same_p = rows["pruning_ratio"] == usual["pruning_ratio"]
    same_r, same_count = (has_setting(rows, name, usual[name]) for name in ("slow_mode_ratio", "slow_steps"))
    is_naive = rows["method"] == "naive_prune"
    draw_curve(left, rows[(same_pruner & ((same_r & same_count) | is_naive)) | is_baseline], "pruning_ratio", "p")
    has_r = rows["slow_mode_ratio"].notna()
    draw_curve(right, rows[(same_pruner & same_p & has_r) | is_baseline], "slow_mode_ratio", "r")
    left.set_title(f"{prefix}Over pruning ratio p, at {slow_steps_of(pd.Series(usual))}")
    right.set_title(f"{prefix}Over slow-mode ratio r, at p = {usual['pruning_ratio']:g}")
    left.set_ylabel("Rel. (% of Baseline, full tokens)")


def draw_curve(axes: Axes, rows: pd.DataFrame, setting: str, symbol: str) -> None:
    """Draw a panel of Figure 5: points labelled with the setting's value, and a line through those of DualSpeed."""
    axes.axhline(100, color=GREY, linewidth=0.8, zorder=0)
    for method, group in rows.sort_values(setting).groupby("method", sort=False):
        errors = [group["rel"] - group["rel_low"], group["rel_high"] - group["rel"]]
        axes.errorbar(
            group["speedup_measured"],
            group["rel"],
            yerr=np.nan_to_num(np.clip(np.array(errors, dtype=float), 0, None), posinf=0),
            color=COLORS[method],
            marker=MARKERS[method],
            markersize=11 if method == "baseline" else 6,
            linestyle="-" if method == "dualspeed" else "none",
            elinewidth=1,
            capsize=2,
            label=METHOD_LABELS[method],
        )
        for row in group.itertuples():
            value = getattr(row, setting)
            if not pd.isna(value):
                text = axes.annotate(
                    f"{symbol} = {value:g}",
                    (row.speedup_measured, row.rel_high),
                    (0, 8),
                    textcoords="offset points",
                    ha="center",
                    fontsize=9,
                )
                text.set_path_effects([patheffects.withStroke(linewidth=3, foreground="white")])
    axes.margins(x=0.14, y=0.14)


def draw_speedup(rows: pd.DataFrame) -> Figure:
    """Measured speedup of a step beside the limit that FLOPs set, for each line that prunes in training."""
    rows = rows[(rows["inference"] == "full") & rows["speedup_theory"].notna() & (rows["method"] != "baseline")]
    if rows.empty:
        return empty_figure("Measured and theoretical speedup: not run")
    places = np.arange(len(rows))
    figure = Figure(figsize=(7.2, 1.5 + 0.34 * len(rows)))
    axes = figure.subplots()
    for method in rows["method"].unique():
        mine = rows["method"] == method
        label = f"{METHOD_LABELS[method]}, measured"
        axes.barh(places[mine], rows["speedup_measured"][mine], 0.62, color=COLORS[method], label=label)
    axes.vlines(rows["speedup_theory"], places - 0.42, places + 0.42, colors="black", label="limit by FLOPs")
    for place, row in enumerate(rows.itertuples()):
        share = row.speedup_measured / row.speedup_theory
        end = max(row.speedup_measured, row.speedup_theory)
        axes.text(end, place, f"  {row.speedup_measured:.2f}x, {share:.0%} of limit", va="center", fontsize=9)
    axes.axvline(1, color=GREY, linewidth=0.8, zorder=0)
    axes.set_yticks(places, name_rows(rows))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.6 * rows[["speedup_measured", "speedup_theory"]].max(axis=None))
    axes.set_xlabel("Speedup of a training step (Baseline = 1)")
    axes.set_title("Measured speedup against what the FLOPs allow")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def draw_mismatch(rows: pd.DataFrame) -> Figure:
    """Mean score of the same models on full and on pruned tokens, a line for each model."""
    if rows["mean"].notna().sum() == 0:
        return empty_figure("Full and pruned inference: not run")
    rows = rows.assign(name=name_rows(rows))
    by_name = rows.pivot(index="name", columns="inference", values="mean").reindex(rows["name"].unique())
    places = dict(zip(by_name.index, range(len(by_name)), strict=True))
    figure = Figure(figsize=(7.2, 1.6 + 0.32 * len(by_name)))
    axes = figure.subplots()
    axes.hlines(list(places.values()), by_name.min(axis=1), by_name.max(axis=1), color=GREY, linewidth=1.5, zorder=1)
    for inference, color, marker in [("full", DARK, "o"), ("pruned", ORANGE, "s")]:
        part = rows[rows["inference"] == inference]
        axes.errorbar(
            part["mean"],
            part["name"].map(places),
            xerr=part["mean_std"].fillna(0),
            color=color,
            marker=marker,
            linestyle="none",
            elinewidth=1,
            capsize=2,
            label=f"{inference} tokens",
        )
    spread = rows["mean_std"].fillna(0)
    ends = rows.assign(low=rows["mean"] - spread, high=rows["mean"] + spread).groupby("name")[["low", "high"]]
    for side, places_of_text, scores in [
        ("right", ends.min()["low"] - 2, by_name.min(axis=1)),
        ("left", ends.max()["high"] + 2, by_name.max(axis=1)),
    ]:
        for name, score in scores.items():
            axes.text(places_of_text[name], places[name], format_number(score), ha=side, va="center", fontsize=9)
    axes.set_yticks(list(places.values()), list(places))
    axes.set_ylim(len(places) - 0.4, -0.6)
    axes.set_xlim(min(50, ends.min()["low"].min() - 10), 110)
    axes.set_xticks([tick for tick in axes.get_xticks() if tick <= 100])
    axes.set_xlabel("Mean score")
    axes.set_title("The same models answering on full and on pruned tokens")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def name_rows(rows: pd.DataFrame) -> list[str]:
    """Name of each line of a summary: method, pruner and p; settings that vary and are unusual; the model."""
    varied = varied_settings(rows)
    usual = usual_settings(rows) if varied else {}
    names = []
    for row in rows.itertuples():
        parts = [METHOD_LABELS[row.method]]
        if not is_baseline(row):
            parts.append(f"{PRUNER_LABELS.get(row.pruner, row.pruner)} p = {row.pruning_ratio:g}")
        if row.method == "dualspeed":
            values = {symbol: (getattr(row, column), usual[column]) for symbol, column in varied.items()}
            parts += [
                f"{symbol} = {value:g}"
                for symbol, (value, usual_one) in values.items()
                if value != usual_one and not pd.isna(value)
            ]
        if rows["model"].nunique() > 1:
            parts.append(row.model)
        names.append(", ".join(parts))
    return names
