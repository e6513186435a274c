"""Two rows side by side, as text for a terminal: what differs in their settings, scores, time and memory."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
from tabulate import tabulate

from dualspeed.errors import ConfigError
from dualspeed.evaluation.bootstrap import INTERVAL, Cell, resample_scores
from dualspeed.reporting.frames import Results, read_results
from dualspeed.reporting.table_format import NOT_APPLICABLE, NOT_RUN
from dualspeed.settings.names import BENCHMARK_LABELS, averaged, in_paper_order
from dualspeed.settings.reading import check_choice
from dualspeed.tracking.store import flatten

Line = tuple[str, ...]  # what, first row's, second row's, difference

# Of each number: its column in speed or costs, its unit, what it is divided by, decimals.
COSTS = (
    ("Training, wall clock", "train_hours", "min", 1 / 60, 1),
    ("GPU time", "gpu_hours", "h", 1, 2),
    ("Speed of training", "samples_per_second", "samples/s", 1, 1),
    ("Fast step", "fast_step_seconds", "ms", 1e-3, 1),
    ("Slow step", "slow_step_seconds", "ms", 1e-3, 1),
    ("Speedup over Baseline", "speedup_measured", "x", 1, 2),
    ("Limit of the speedup", "speedup_theory", "x", 1, 2),
    ("In the pruner", "pruner_share", "% of a fast step", 1e-2, 1),
    ("Peak memory", "peak_memory_bytes", "MiB", 2**20, 0),
)
LEFT_OUT = ("id", "tables", "inferences", "pretrain_key", "speed_key", "settings_hash")  # follow from the others


def compare(settings: dict[str, Any], first: str, second: str) -> str:
    """The comparison of two rows of a sheet; settings as in `tables.write_tables`.

    Raises:
        ConfigError: the sheet has no such row; lists those that it has.
        ValueError: a file of the results tree is broken.
    """
    rows = {row["id"]: row for row in settings["experiments"]}
    for name in (first, second):
        check_choice("row", name, rows)
    if first == second:
        raise ConfigError(f"row: {first!r} twice; valid: two rows")
    pair = [rows[first], rows[second]]
    results = read_results(settings | {"experiments": pair})
    lines: list[Line] = [("", first, second, "Difference")]
    for title, part in (
        ("Settings that differ", list(setting_lines(*pair))),
        ("Scores, percent [95 % interval]", list(score_lines(settings, results, first, second))),
        ("Time and memory", list(cost_lines(results, first, second))),
    ):
        lines += [("", "", "", ""), (title, "", "", "")]
        lines += part or [("none", "", "", "")]
    return tabulate(lines, tablefmt="plain", colalign=("left", "right", "right", "right"), disable_numparse=True)


def setting_lines(first: dict[str, Any], second: dict[str, Any]) -> Iterator[Line]:
    """Settings in which two rows differ."""
    one, other = (flatten({key: value for key, value in row.items() if key not in LEFT_OUT}) for row in (first, second))
    for key in one | other:
        if one.get(key) != other.get(key):
            yield key.removeprefix("dualspeed."), *(_text(cells.get(key)) for cells in (one, other)), ""


def score_lines(settings: dict[str, Any], results: Results, first: str, second: str) -> Iterator[Line]:
    """Each benchmark on full and on pruned tokens, then their mean; differences are paired over the same questions."""
    scores = resample_scores(results.statistics)
    for inference in ("full", "pruned"):
        for benchmark in in_paper_order(settings["benchmarks"]):
            drawn = [scores.get((name, inference, benchmark)) for name in (first, second)]
            yield from _score_line(f"{BENCHMARK_LABELS.get(benchmark, benchmark)}, {inference} tokens", drawn)
        drawn = [_mean(scores, name, inference, averaged(settings["benchmarks"])) for name in (first, second)]
        yield from _score_line(f"Mean, {inference} tokens", drawn)


def cost_lines(results: Results, first: str, second: str) -> Iterator[Line]:
    """What either row has of COSTS; the second as a multiple of the first."""
    numbers = (
        results.speed.drop(columns=["train_seconds"]).merge(results.costs, on="experiment").set_index("experiment")
    )
    for label, column, unit, scale, digits in COSTS:
        values = [numbers[column][name] for name in (first, second)]
        if not all(map(pd.isna, values)):
            cells = [NOT_APPLICABLE if pd.isna(value) else f"{value / scale:.{digits}f}" for value in values]
            ratio = "" if any(map(pd.isna, values)) or not values[0] else f"{values[1] / values[0]:.2f}x"
            yield f"{label} ({unit})", *cells, ratio


def _mean(scores: dict[Cell, np.ndarray], name: str, inference: str, benchmarks: list[str]) -> np.ndarray | None:
    found = [scores[name, inference, one] for one in benchmarks if (name, inference, one) in scores]
    return np.mean(found, axis=0) if len(found) == len(benchmarks) else None


def _score_line(what: str, drawn: list[np.ndarray | None]) -> Iterator[Line]:
    """One line, unless neither row has run; `drawn` are scores on the real questions, then on each draw of them."""
    if all(one is None for one in drawn):
        return
    cells = [NOT_RUN if one is None else _with_interval(one, lambda value: f"{value:.1f}") for one in drawn]
    first, second = drawn
    difference = ""
    if first is not None and second is not None:
        difference = _with_interval(second - first, lambda value: f"{value:+.1f}")
    yield what, *cells, difference


def _with_interval(drawn: np.ndarray, text: Callable[[float], str]) -> str:
    low, high = np.percentile(drawn[1:], INTERVAL)
    return f"{text(drawn[0])} [{text(low)}, {text(high)}]"


def _text(value: object) -> str:
    if value is None:
        return NOT_APPLICABLE
    return f"{value:g}" if isinstance(value, float) else str(value)
