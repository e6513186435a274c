"""Time of a step by its parts, beside the limit that its FLOPs set.

    python -m measurements.step_parts [--model small] [--rounds 5] [--figure docs/img/step-parts.png]

Times the parts of train_step.py's steps in turns and takes means over the rounds. A step's limit is Baseline's time
times the ratio of their FLOPs.
"""

import argparse
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import torch
from matplotlib.figure import Figure

from dualspeed.device import machine
from dualspeed.method import fast_mode, model, objective
from dualspeed.reporting.figures.style import LIGHT, styled
from dualspeed.training.step_times import count_flops
from measurements.models import MODELS
from measurements.stopwatch import Stopwatch
from measurements.train_step import PRUNING_RATIO, SLOW_MODE_RATIO, Step, make_steps, mixed

STEPS = {"baseline": "Baseline", "naive": "NaivePrune", "fast": "DualSpeed, fast", "slow": "DualSpeed, slow"}
# In the order of a step.
PARTS = {
    "vision tower, projector": "#56B4E9",
    "pruner": "#E69F00",
    "sequences": "#F0E442",
    "teacher": "#CC79A7",
    "language model": "#0072B2",
    "losses": "#000000",
    "backward": "#009E73",
    "clipping, AdamW": "#999999",
    "rest": "#DDDDDD",
}
MIXED = f"DualSpeed, r = {SLOW_MODE_RATIO}"


def main() -> None:
    """Print the table and draw it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="small", choices=sorted(MODELS))
    parser.add_argument("--rounds", type=int, default=5, help="how often each step is timed, after one to warm up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--figure", type=Path, help="draw the table here, a PNG")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    _, steps = make_steps(MODELS[options.model], tuple(STEPS))
    parts = measure(steps, options.rounds)
    limits = limits_by_flops(steps, parts.loc["Baseline"].sum())
    print(f"{options.model} on {machine()}, torch {torch.__version__}, {options.threads} threads, seconds")
    print(parts.assign(**{"whole step": parts.sum(axis=1), "limit": limits}).T.to_markdown(floatfmt=".3f"))
    if options.figure:
        with styled():
            draw(parts, limits, f"{options.model} on {machine()}").savefig(options.figure, dpi=130)


def measure(steps: dict[str, Step], rounds: int) -> pd.DataFrame:
    """Mean seconds of each part (columns) of each step (rows)."""
    watches = {name: Stopwatch() for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            time_parts(watches[name], step)
    rows = {STEPS[name]: watch.seconds for name, watch in watches.items()}
    parts = pd.DataFrame(rows).T.reindex(columns=list(PARTS)).fillna(0.0) / rounds
    parts.loc[MIXED] = mixed(parts.loc["DualSpeed, fast"], parts.loc["DualSpeed, slow"])
    return parts


def time_parts(watch: Stopwatch, step: Step) -> None:
    """Run a step once and time its parts."""
    optimizer = step.args[1]

    def forward() -> str:
        return "language model" if torch.is_grad_enabled() else "teacher"

    with ExitStack() as contexts:
        for part, owner, name in (
            ("vision tower, projector", fast_mode, "encode_images"),
            ("pruner", fast_mode, "keep_tokens"),
            ("sequences", fast_mode, "prune_inputs"),
            (forward, objective, "supervised_logits"),
            ("losses", objective, "cross_entropy"),
            ("losses", model, "distillation"),
            ("backward", torch.Tensor, "backward"),
            ("clipping, AdamW", torch.nn.utils, "clip_grad_norm_"),
            ("clipping, AdamW", optimizer, "step"),
            ("clipping, AdamW", optimizer, "zero_grad"),
        ):
            contexts.enter_context(watch.on(part, owner, name))
        whole = SimpleNamespace(step=step)
        with watch.on("rest", whole, "step"):
            whole.step()


def limits_by_flops(steps: dict[str, Step], baseline_seconds: float) -> pd.Series:
    """Seconds of each step if it ran at Baseline's FLOPs per second."""
    flops = pd.Series({STEPS[name]: count_flops(step) for name, step in steps.items()}, dtype=float)
    flops[MIXED] = mixed(flops["DualSpeed, fast"], flops["DualSpeed, slow"])
    return baseline_seconds * flops / flops["Baseline"]


def draw(parts: pd.DataFrame, limits: pd.Series, title: str) -> Figure:
    """Draw one bar per step, divided into its parts, with a mark at its limit by FLOPs."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    start = pd.Series(0.0, index=parts.index)
    for part, color in PARTS.items():
        axes.barh(parts.index, parts[part], left=start, color=color, height=0.62, label=part)
        start += parts[part]
    for position, step in enumerate(parts.index):
        label = "limit by FLOPs" if position == 1 else None
        if step != "Baseline":
            limit = [limits[step]] * 2
            axes.plot(limit, [position - 0.42, position + 0.42], color="#D55E00", linewidth=2.4, label=label)
        speedup = start["Baseline"] / start[step]
        axes.annotate(f" {start[step]:.2f} s, {speedup:.2f}x", (start[step], position), va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(right=1.17 * start.max())
    axes.set_xlabel("Seconds a step")
    axes.set_title(f"Where a step's time goes at p = {PRUNING_RATIO}: {title}", fontsize=10)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=LIGHT)
    axes.set_axisbelow(True)
    figure.legend(loc="outside right center", fontsize=9)
    return figure


if __name__ == "__main__":
    main()
