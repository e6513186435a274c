"""Rel.: how much of the Baseline's performance a method keeps, with a paired bootstrap interval.

Rel. of a model is the mean over benchmarks of its score divided by that of the Baseline of the same base model and
seed on full tokens, in percent; Rel. of a method is the mean of that over its seeds. The interval is the 2.5th to
97.5th percentile over RESAMPLES draws of the benchmarks' questions with replacement (of images, where a benchmark pairs
the questions of an image): each draw scores every model on the very same questions, so that what makes a draw easy for
all of them cancels. It says what another set of questions would change; what another seed would change is the standard
deviation beside it. Draws are the same on every machine, and for every sheet.
"""

import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable

import numpy as np

from dualspeed.benchmarks import get_benchmark

RESAMPLES = 2000
INTERVAL = (2.5, 97.5)  # percentiles
DRAWS_AT_ONCE = 4_000_000
Cell = tuple[str, str, str]  # experiment, inference, benchmark


def resample_scores(statistics: dict[Cell, np.ndarray]) -> dict[Cell, np.ndarray]:
    """Score in percent of each cell: (1 + RESAMPLES,), on the real questions first, then on each draw of them.

    `statistics` are (units, m) per cell; cells of a benchmark must have the same units in the same order.
    """
    cells = defaultdict(list)
    for cell in statistics:
        cells[cell[2]].append(cell)
    scores: dict[Cell, np.ndarray] = {}
    for benchmark, members in cells.items():
        stacked = np.stack([statistics[cell] for cell in members])
        percents = _resample(benchmark, stacked, get_benchmark(benchmark).percent_from_sums)
        scores |= dict(zip(members, percents, strict=True))
    return scores


def bootstrap_interval(
    benchmark: str, statistics: np.ndarray, from_sums: Callable[[np.ndarray], np.ndarray]
) -> list[float]:
    """Lower and upper end of the 95 % interval of one score, whose sums over units are `statistics` (units, m)."""
    (drawn,) = _resample(benchmark, statistics[None], from_sums)
    return np.percentile(drawn[1:], INTERVAL).tolist()


def _resample(benchmark: str, statistics: np.ndarray, from_sums: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """(models, units, m) -> (models, 1 + RESAMPLES); draws depend on the benchmark's name and number of units."""
    models, units, m = statistics.shape
    stacked = statistics.transpose(1, 0, 2).reshape(units, models * m)
    random = np.random.default_rng(zlib.crc32(benchmark.encode()))
    sums = [stacked.sum(axis=0)[None]]
    step = max(1, DRAWS_AT_ONCE // units)
    for start in range(0, RESAMPLES, step):
        draws = min(step, RESAMPLES - start)
        drawn = random.integers(units, size=(draws, units)) + np.arange(draws)[:, None] * units
        sums.append(np.bincount(drawn.ravel(), minlength=draws * units).reshape(draws, units) @ stacked)
    return from_sums(np.concatenate(sums).reshape(-1, models, m)).T


def relative(
    scores: dict[Cell, np.ndarray], pairs: Iterable[tuple[str, str]], inference: str, benchmarks: list[str]
) -> np.ndarray | None:
    """Rel. in percent of each (experiment, its Baseline) pair: (pairs, 1 + RESAMPLES).

    Pairs of which a benchmark has not run on either side are left out; None if that leaves nothing.
    """
    found = []
    for experiment, baseline in pairs:
        mine = [(experiment, inference, benchmark) for benchmark in benchmarks]
        theirs = [(baseline, "full", benchmark) for benchmark in benchmarks]
        if all(cell in scores for cell in mine + theirs):
            ours, full = (np.stack([scores[cell] for cell in cells]) for cells in (mine, theirs))
            with np.errstate(divide="ignore", invalid="ignore"):
                found.append(100 * np.mean(ours / full, axis=0))
    return np.stack(found) if found else None
