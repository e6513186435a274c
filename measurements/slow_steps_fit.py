"""File, fit and figures of the study in slow_steps.py.

The fit is a plane: the log-odds of a right answer over the logarithms of all steps T and of slow steps N. It is made of
the rows with the role `fit`. A row with the role `test` should lie within the 95 % prediction interval of a new run.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import t as student

from dualspeed.files import write_atomic

LEVEL = 0.95
FILE, FIGURE, TIME_FIGURE, FIT = "slow_steps.csv", "slow_steps.png", "score_over_time.png", "fit.md"


class Fit(NamedTuple):
    """Least-squares fit of log-odds = a + b ln T + c ln N."""

    coefficients: np.ndarray
    """(3,) a, b, c."""
    errors: np.ndarray
    """(3,) half widths of their 95 % intervals."""
    inverse: np.ndarray
    """(3, 3) inverse of the normal matrix."""
    variance: float
    """Variance of a run around the fit."""
    quantile: float
    """Student's t for 95 % intervals with the fit's degrees of freedom."""

    def interval(self, steps: float, slow_steps: float) -> tuple[float, float, float]:
        """Expected score in percent, and the ends of the prediction interval of a run."""
        place = np.array([1.0, math.log(steps), math.log(slow_steps)])
        middle = float(place @ self.coefficients)
        width = self.quantile * math.sqrt(self.variance * (1 + place @ self.inverse @ place))
        low, mean, high = (100 / (1 + math.exp(-odds)) for odds in (middle - width, middle, middle + width))
        return mean, low, high


def fit_plane(frame: pd.DataFrame) -> Fit:
    """Fit to the scores of a frame with the columns steps, slow_steps and score."""
    places = np.column_stack([np.ones(len(frame)), np.log(frame["steps"]), np.log(frame["slow_steps"])])
    share = frame["score"] / 100
    odds = np.log(share / (1 - share)).to_numpy()
    inverse = np.linalg.inv(places.T @ places)
    coefficients = inverse @ places.T @ odds
    freedom = len(frame) - len(coefficients)
    variance = float(((odds - places @ coefficients) ** 2).sum() / freedom)
    quantile = float(student.ppf((1 + LEVEL) / 2, freedom))
    return Fit(coefficients, quantile * np.sqrt(variance * np.diag(inverse)), inverse, variance, quantile)


def tidy(results: Sequence[tuple[Any, dict[str, Any] | None]], step_seconds: dict[str, float]) -> pd.DataFrame:
    """A row for each run that is done; `seconds` is its time by measured step times, without other load."""
    rows = [
        asdict(row) | {"score": result["score"], **result["scores"], "num_slow_steps": result["num_slow_steps"]}
        for row, result in results
        if result is not None
    ]
    frame = pd.DataFrame(rows)
    slow = np.where(frame["role"] == "baseline", step_seconds["baseline"], step_seconds["slow"])
    fast = frame["steps"] - frame["num_slow_steps"]
    return frame.assign(seconds=frame["num_slow_steps"] * slow + fast * step_seconds["fast"])


def report(results: Sequence[tuple[Any, dict[str, Any] | None]], step_seconds: dict[str, float], out: Path) -> None:
    """Write the tidy file, the figures, and the fit with its test."""
    frame = tidy(results, step_seconds)
    write_atomic(out / FILE, frame.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
    fit = fit_plane(frame[frame["role"] == "fit"])
    text = "\n\n".join([describe(fit), worth(fit, step_seconds), test_table(fit, frame), variants_table(frame)]) + "\n"
    write_atomic(out / FIT, text)
    draw_scores(frame, fit).savefig(out / FIGURE, dpi=110)
    draw_over_time(frame).savefig(out / TIME_FIGURE, dpi=110)
    print(text)
    print(f"{len(frame)} of {len(results)} runs: {out / FILE}, {out / FIT}, {out / FIGURE}, {out / TIME_FIGURE}")


def describe(fit: Fit) -> str:
    """The fit in words."""
    names = ("constant", "ln(steps)", "ln(slow steps)")
    parts = [
        f"{name} {value:.2f} ± {error:.2f}"
        for name, value, error in zip(names, fit.coefficients, fit.errors, strict=True)
    ]
    return f"log-odds of a right answer: {', '.join(parts)}; a run lies {math.sqrt(fit.variance):.2f} around it (1 sd)."


def worth(fit: Fit, step_seconds: dict[str, float]) -> str:
    """Time that slow steps are worth: where it pays to make more of them, and where fewer.

    With T steps, N of them slow, of which each costs k fast steps, the time is T - N + k N. Where the score rises with
    b ln T + c ln N, it is highest for a given time at N / T = c / (b (k - 1)), or where every step is slow.
    """
    _, per_step, per_slow_step = fit.coefficients
    measured = step_seconds["slow"] / step_seconds["fast"]
    lines = [
        f"twice the slow steps are worth {2 ** (per_slow_step / per_step):.1f} times all steps, in score; "
        f"a slow step takes {measured:.2f} fast steps here",
        *(
            f"share of slow steps with the highest score in a given time, where one takes {ratio:.3g} fast steps: "
            f"{min(1.0, per_slow_step / (per_step * (ratio - 1))):.2f}"
            for ratio in (measured, 5, 10, 20)
        ),
    ]
    return "\n".join(lines)


def test_table(fit: Fit, frame: pd.DataFrame) -> str:
    """Each left-out run beside the fit's interval."""
    lines = []
    for row in frame[frame["role"] == "test"].itertuples():
        mean, low, high = fit.interval(row.steps, row.slow_steps)
        verdict = "inside" if low <= row.score <= high else "outside"
        lines.append(
            (row.steps, row.slow_steps, row.seed, f"{row.score:.1f}", f"{mean:.1f} [{low:.1f}, {high:.1f}]", verdict)
        )
    columns = ["steps", "slow steps", "seed", "score", "fit and 95 % interval of a run", ""]
    return pd.DataFrame(lines, columns=columns).to_markdown(index=False, disable_numparse=True)


def variants_table(frame: pd.DataFrame) -> str:
    """Each variant beside the plain method of the same steps, slow steps and seed."""
    keys = ["steps", "slow_steps", "seed"]
    plain = frame[frame["role"].isin(("fit", "test"))].set_index(keys)["score"]
    lines = []
    variants = frame[frame["role"] == "variant"]
    for name, group in variants.groupby(variants["id"].str.replace(r"-seed\d+$", "", regex=True), sort=False):
        scores = group.set_index(keys)["score"]
        both = scores.to_frame("variant").join(plain.rename("plain"), how="inner")
        change = (both["variant"] - both["plain"]).mean()
        lines.append((name, ", ".join(f"{score:.1f}" for score in scores), f"{change:+.1f}"))
    return pd.DataFrame(lines, columns=["variant", "scores by seed", "change to the plain method"]).to_markdown(
        index=False
    )


def draw_scores(frame: pd.DataFrame, fit: Fit) -> Figure:
    """Score over slow steps, a line for each length, with the fit's lines."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    plain = frame[frame["role"].isin(("fit", "test"))]
    for number, (steps, group) in enumerate(plain.groupby("steps")):
        means = group.groupby("slow_steps")["score"].mean()
        axes.plot(means.index, means, color=f"C{number}", linewidth=1.5, label=f"{steps:,} steps")
        for role, marker in (("fit", "o"), ("test", "D")):
            part = group[group["role"] == role]
            axes.plot(part["slow_steps"], part["score"], marker, color=f"C{number}", markersize=5, linestyle="none")
        axes.plot(
            means.index, [fit.interval(steps, slow)[0] for slow in means.index], ":", color=f"C{number}", linewidth=1
        )
    axes.set_xscale("log")
    axes.set_xticks(
        sorted(plain["slow_steps"].unique()), [str(value) for value in sorted(plain["slow_steps"].unique())]
    )
    axes.minorticks_off()
    axes.set_xlabel("Slow steps")
    axes.set_ylabel("Score on held-out scenes (mean of four benchmarks)")
    axes.set_title("Dots: runs of the fit. Diamonds: runs that it was tested on. Dotted: the fit.", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def draw_over_time(frame: pd.DataFrame) -> Figure:
    """Score over training time of runs of several lengths: Baseline, and DualSpeed with a tenth of slow steps."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    plain = frame[frame["role"].isin(("fit", "test"))]
    curves = {
        "Baseline": frame[frame["role"] == "baseline"],
        "DualSpeed, r = 0.1": plain[plain["slow_steps"] * 10 == plain["steps"]],
        "DualSpeed, 40 slow steps": plain[plain["slow_steps"] == 40],
    }
    for number, (name, runs) in enumerate(curves.items()):
        by_length = runs.groupby("steps").agg(
            seconds=("seconds", "mean"), mean=("score", "mean"), low=("score", "min"), high=("score", "max")
        )
        axes.plot(by_length["seconds"], by_length["mean"], "o-", color=f"C{number}", label=name)
        axes.fill_between(by_length["seconds"], by_length["low"], by_length["high"], color=f"C{number}", alpha=0.15)
        for steps, line in by_length.iterrows():
            axes.annotate(
                f"{steps}", (line["seconds"], line["mean"]), fontsize=8, xytext=(3, -11), textcoords="offset points"
            )
    axes.set_xscale("log")
    ticks = [30, 60, 100, 200, 400]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("Seconds of training (steps times their measured time)")
    axes.set_ylabel("Score on held-out scenes (mean of four benchmarks)")
    axes.set_title("Runs of several lengths (steps beside each point); bands: lowest and highest seed", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure
