"""Comparison of two rows as text for a terminal: settings that differ, scores, time and memory."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
from tabulate import tabulate

from dualspeed.errors import ConfigError
from dualspeed.evaluation.bootstrap import INTERVAL
from dualspeed.reporting.frames import Results, read_results
from dualspeed.reporting.table_format import NOT_APPLICABLE, NOT_RUN
from dualspeed.settings.identity import record
from dualspeed.settings.names import BENCHMARK_LABELS, averaged
from dualspeed.settings.reading import check_choice
from dualspeed.settings.sheet import Row, Sheet
from dualspeed.tracking.store import flatten


class Line(NamedTuple):
    """One line of the comparison, as text."""

    label: str
    first: str
    second: str
    difference: str


class Cost(NamedTuple):
    """A number of speed or cost."""

    label: str
    column: str
    """Column of `Results.speed` or `Results.costs`."""
    unit: str
    divisor: float
    """Value of one unit in the column."""
    digits: int
    """Decimals shown."""


COSTS = (
    Cost("Training, wall clock", "train_hours", "min", 1 / 60, 1),
    Cost("GPU time", "gpu_hours", "h", 1, 2),
    Cost("Speed of training", "samples_per_second", "samples/s", 1, 1),
    Cost("Fast step", "fast_step_seconds", "ms", 1e-3, 1),
    Cost("Slow step", "slow_step_seconds", "ms", 1e-3, 1),
    Cost("Speedup over Baseline", "speedup_measured", "x", 1, 2),
    Cost("Limit of the speedup", "speedup_theory", "x", 1, 2),
    Cost("In the pruner", "pruner_share", "% of a fast step", 1e-2, 1),
    Cost("Peak memory", "peak_memory_bytes", "MiB", 2**20, 0),
)
# Fields of a row that follow from its other fields, and `tables`, which changes no result.
LEFT_OUT = ("id", "tables", "pretrain_key", "speed_key", "settings_hash")


def compare(sheet: Sheet, first: str, second: str) -> str:
    """Comparison of the rows with the ids `first` and `second`.

    Raises:
        ConfigError: the sheet has no such row; the message lists its rows.
        ResultsError: a result is broken.
    """
    rows = {row.id: row for row in sheet.rows}
    for name in (first, second):
        check_choice("row", name, rows)
    if first == second:
        raise ConfigError(f"row: {first!r} twice; valid: two rows")
    results = read_results(replace(sheet, rows=(rows[first], rows[second])))
    lines = [Line("", first, second, "Difference")]
    for title, part in (
        ("Settings that differ", list(setting_lines(rows[first], rows[second]))),
        ("Scores, percent [95 % interval]", list(score_lines(results, first, second))),
        ("Time and memory", list(cost_lines(results, first, second))),
    ):
        lines += [Line("", "", "", ""), Line(title, "", "", "")]
        lines += part or [Line("none", "", "", "")]
    return tabulate(lines, tablefmt="plain", colalign=("left", "right", "right", "right"), disable_numparse=True)


def setting_lines(first: Row, second: Row) -> Iterator[Line]:
    """Settings in which two rows differ."""
    one, other = (
        flatten({key: value for key, value in record(row).items() if key not in LEFT_OUT}) for row in (first, second)
    )
    for key in one | other:
        if one.get(key) != other.get(key):
            yield Line(key.removeprefix("dualspeed."), _text(one.get(key)), _text(other.get(key)), "")


def score_lines(results: Results, first: str, second: str) -> Iterator[Line]:
    """Scores on full and on pruned tokens, and their mean; differences are paired over the same questions."""
    for inference in ("full", "pruned"):
        for benchmark in results.benchmarks:
            scores = [results.draws.get((name, inference, benchmark)) for name in (first, second)]
            yield from _score_line(f"{BENCHMARK_LABELS.get(benchmark, benchmark)}, {inference} tokens", *scores)
        means = [_mean(results, name, inference) for name in (first, second)]
        yield from _score_line(f"Mean, {inference} tokens", *means)


def cost_lines(results: Results, first: str, second: str) -> Iterator[Line]:
    """Each of COSTS that a row has a value of; the difference is the second value as a multiple of the first."""
    numbers = (
        results.speed.drop(columns=["train_seconds"]).merge(results.costs, on="experiment").set_index("experiment")
    )
    for cost in COSTS:
        values = [numbers[cost.column][name] for name in (first, second)]
        if not all(map(pd.isna, values)):
            texts = [NOT_APPLICABLE if pd.isna(one) else f"{one / cost.divisor:.{cost.digits}f}" for one in values]
            ratio = "" if any(map(pd.isna, values)) or not values[0] else f"{values[1] / values[0]:.2f}x"
            yield Line(f"{cost.label} ({cost.unit})", texts[0], texts[1], ratio)


def _mean(results: Results, name: str, inference: str) -> np.ndarray | None:
    """Draws of a row's mean score, (1 + RESAMPLES,); None while a benchmark is missing."""
    cells = [(name, inference, benchmark) for benchmark in averaged(results.benchmarks)]
    if any(cell not in results.draws for cell in cells):
        return None
    return np.mean([results.draws[cell] for cell in cells], axis=0)


def _score_line(label: str, first: np.ndarray | None, second: np.ndarray | None) -> Iterable[Line]:
    """One line, or none if neither row has a score; scores are (1 + RESAMPLES,), as in `Results.draws`."""
    if first is None and second is None:
        return []
    texts = [NOT_RUN if one is None else _with_interval(one, lambda value: f"{value:.1f}") for one in (first, second)]
    difference = ""
    if first is not None and second is not None:
        difference = _with_interval(second - first, lambda value: f"{value:+.1f}")
    return [Line(label, texts[0], texts[1], difference)]


def _with_interval(draws: np.ndarray, text: Callable[[float], str]) -> str:
    low, high = np.percentile(draws[1:], INTERVAL)
    return f"{text(draws[0])} [{text(low)}, {text(high)}]"


def _text(value: object) -> str:
    if value is None:
        return NOT_APPLICABLE
    return f"{value:g}" if isinstance(value, float) else str(value)
