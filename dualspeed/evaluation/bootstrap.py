"""Paired bootstrap over questions, and Rel., the share of the Baseline's performance that a method keeps.

Rel. of a model is the mean over benchmarks of its score divided by that of the Baseline with the same base model and
seed on full tokens, in percent; Rel. of a method is the mean over its seeds. The interval is the 2.5th to 97.5th
percentile over RESAMPLES draws, with replacement, of a benchmark's units: questions, or images where a benchmark pairs
the questions of an image. Each draw scores every model on the same units (paired), so that a draw which is easy for all
models cancels out of their ratio. The interval measures the effect of the choice of questions; the standard deviation
that tables print beside it measures the effect of the seed. Draws depend only on a benchmark's name and number of
units, so they are equal on every machine and for every sheet.
"""

import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable

import numpy as np

from dualspeed.benchmarks import get_benchmark

RESAMPLES = 2000
INTERVAL = (2.5, 97.5)  # percentiles
MAX_DRAWN_UNITS = 4_000_000  # held in memory at once
Cell = tuple[str, str, str]
"""Id of a score: (experiment, inference, benchmark)."""


def resample_scores(statistics: dict[Cell, np.ndarray]) -> dict[Cell, np.ndarray]:
    """Scores in percent of each cell: (1 + RESAMPLES,), the real one first, then one per draw.

    `statistics` are (units, m) per cell; cells of a benchmark must have the same units in the same order.
    """
    by_benchmark = defaultdict(list)
    for cell in statistics:
        by_benchmark[cell[2]].append(cell)
    scores: dict[Cell, np.ndarray] = {}
    for benchmark, cells in by_benchmark.items():
        stacked = np.stack([statistics[cell] for cell in cells])
        percents = _resample(benchmark, stacked, get_benchmark(benchmark).percent_from_sums)
        scores |= dict(zip(cells, percents, strict=True))
    return scores


def bootstrap_interval(
    benchmark: str, statistics: np.ndarray, from_sums: Callable[[np.ndarray], np.ndarray]
) -> list[float]:
    """Lower and upper end of the 95 % interval of one score with these `statistics` (units, m)."""
    (drawn,) = _resample(benchmark, statistics[None], from_sums)
    return interval_of(drawn).tolist()


def interval_of(values: np.ndarray) -> np.ndarray:
    """Lower and upper end of the 95 % interval of (1 + RESAMPLES,) values, the real one first; an end may be inf."""
    if np.isfinite(values[1:]).all():
        return np.percentile(values[1:], INTERVAL)
    return np.percentile(values[1:], INTERVAL, method="inverted_cdf")  # between two infs is nothing to interpolate


def paired_interval(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Lower and upper end of the 95 % interval of the mean of `second` - `first`, over questions and seeds.

    Each draw of the questions also draws seeds with replacement, one fewer than there are: so the variance of their
    mean is unbiased (Rao and Wu, 1988, "Resampling inference with complex survey data").

    Args:
        first, second: (seeds, 1 + RESAMPLES) numbers of two ways of training with the same seeds, the real one first.
    """
    differences = second - first
    num_seeds, num_draws = differences.shape
    seeds = np.random.default_rng(num_seeds).integers(num_seeds, size=(num_draws - 1, max(1, num_seeds - 1)))
    drawn = differences[seeds, np.arange(1, num_draws)[:, None]].mean(axis=1)
    return interval_of(np.concatenate([[differences[:, 0].mean()], drawn]))


def _resample(benchmark: str, statistics: np.ndarray, from_sums: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Scores of models on the real units, then on each draw: (models, units, m) -> (models, 1 + RESAMPLES)."""
    models, units, m = statistics.shape
    stacked = statistics.transpose(1, 0, 2).reshape(units, models * m)
    random = np.random.default_rng(zlib.crc32(benchmark.encode()))
    sums = [stacked.sum(axis=0)[None]]
    step = max(1, MAX_DRAWN_UNITS // units)
    for start in range(0, RESAMPLES, step):
        draws = min(step, RESAMPLES - start)
        drawn = random.integers(units, size=(draws, units)) + np.arange(draws)[:, None] * units
        sums.append(np.bincount(drawn.ravel(), minlength=draws * units).reshape(draws, units) @ stacked)
    return from_sums(np.concatenate(sums).reshape(-1, models, m)).T


def relative(
    scores: dict[Cell, np.ndarray],
    experiments_and_baselines: Iterable[tuple[str, str]],
    inference: str,
    benchmarks: list[str],
) -> np.ndarray | None:
    """Rel. in percent of each (experiment, its Baseline): (experiments, 1 + RESAMPLES).

    It is inf, and means nothing, where the Baseline scores 0 on a benchmark. An experiment is left out if it or its
    Baseline lacks the score of a benchmark; None if none remains.
    """
    relatives = []
    for experiment, baseline in experiments_and_baselines:
        own_cells = [(experiment, inference, benchmark) for benchmark in benchmarks]
        baseline_cells = [(baseline, "full", benchmark) for benchmark in benchmarks]
        if all(cell in scores for cell in own_cells + baseline_cells):
            own, full = (np.stack([scores[cell] for cell in cells]) for cells in (own_cells, baseline_cells))
            shares = np.divide(own, full, out=np.full_like(own, np.inf), where=full != 0)
            relatives.append(100 * np.mean(shares, axis=0))
    return np.stack(relatives) if relatives else None
