"""Intervals of Table 3: paired over questions and seeds, and what its note calls significant."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import norm

from dualspeed.evaluation.bootstrap import RESAMPLES, paired_interval
from dualspeed.layout import Layout
from dualspeed.reporting.ablation import ablation_rows, gain_intervals, gains, significance
from dualspeed.reporting.frames import Results, read_results
from dualspeed.reporting.summary import summarise, with_baseline
from dualspeed.reporting.tables import write_tables
from dualspeed.settings.sheet import Sheet
from tests.support.results_tree import make_row, write_score, write_training

SEEDS = range(5)


def make_ablation(root, naive: list[int], modes: list[int]) -> Sheet:
    """Five seeds of Baseline (all right), NaivePrune and fast and slow modes, with the right answers of each seed."""
    layout, rows = Layout(str(root)), []
    for seed in SEEDS:
        for name, method, right, settings in (
            ("base", "baseline", 100, {}),
            ("naive", "naive_prune", naive[seed], {}),
            ("modes", "dualspeed", modes[seed], {"num_virtual_tokens": 0, "distillation_weight": 0.0}),
        ):
            row = make_row(f"{name}-{seed}", method, seed, ("table3",), **settings)
            rows.append(row)
            write_score(layout, row.id, "gqa", right)
            write_training(layout.model(row.id), 100.0)
    return Sheet(name="demo", results=str(root), benchmarks=("gqa",), rows=tuple(rows))


def change_of(results: Results) -> tuple[float, np.ndarray, str]:
    """Change of the second step, its interval, and the sentence about it."""
    rows = summarise(results, results.sheet.rows)
    rows = ablation_rows(rows[rows["inference"] == "full"], results.benchmarks)
    intervals = gain_intervals(rows, results)
    return gains(rows)[1], intervals[1], significance(rows, intervals)


def test_the_interval_of_a_constant_difference_is_a_point():
    scores = np.random.default_rng(0).normal(size=(5, 1 + RESAMPLES))
    assert paired_interval(scores, scores).tolist() == [0, 0]
    assert paired_interval(scores, scores + 2) == pytest.approx([2, 2])


def test_seeds_alone_give_the_interval_of_their_mean():
    """Without noise of questions, the width is that of a mean whose variance is the seeds' over their number."""
    differences = np.array([1.0, 3.0, -2.0, 4.0, 0.0, 2.5, 1.5, -1.0])
    second = np.tile(differences[:, None], (1, 1 + RESAMPLES))
    low, high = paired_interval(np.zeros_like(second), second)
    width = 2 * norm.ppf(0.975) * differences.std(ddof=1) / len(differences) ** 0.5
    assert low < differences.mean() < high
    assert high - low == pytest.approx(width, rel=0.1)


def test_one_seed_leaves_the_questions():
    random = np.random.default_rng(1)
    first, second = random.normal(size=(2, 1, 1 + RESAMPLES))
    expected = np.percentile((second - first)[0, 1:], [2.5, 97.5])
    assert paired_interval(first, second) == pytest.approx(expected)


def test_a_change_that_every_seed_has_is_significant(tmp_path):
    sheet = make_ablation(tmp_path / "results", [50, 52, 48, 51, 49], [60, 62, 58, 61, 59])
    gain, (low, high), sentence = change_of(read_results(sheet))
    assert gain == pytest.approx(10) and 0 < low < 10 < high
    assert sentence == "+ fast and slow modes: significant."
    write_tables(sheet, tmp_path / "tables")
    text = (tmp_path / "tables/table3.md").read_text()
    assert f"+10.00 [{low:+.2f}, {high:+.2f}]" in text and sentence in text


def test_a_change_that_half_of_the_seeds_have_is_not(tmp_path):
    sheet = make_ablation(tmp_path / "results", [50, 50, 50, 50, 50], [60, 41, 61, 40, 52])
    gain, (low, high), sentence = change_of(read_results(sheet))
    assert low < 0 < gain < high
    assert sentence == "+ fast and slow modes: not significant."


def test_pairs_are_of_equal_seeds(tmp_path):
    """A seed that shifts both ways of training alike makes no interval wider."""
    shifted = make_ablation(tmp_path / "a", [20, 40, 60, 80, 50], [30, 50, 70, 90, 60])
    crossed = make_ablation(tmp_path / "b", [20, 40, 60, 80, 50], [90, 70, 50, 30, 60])
    widths = [np.ptp(change_of(read_results(sheet))[1]) for sheet in (shifted, crossed)]
    assert widths[0] < 10 < 40 < widths[1]


def test_a_row_is_paired_with_the_baseline_that_is_as_long(tmp_path):
    sheet = make_ablation(tmp_path / "results", [50] * 5, [60] * 5)
    short = [make_row("base-short", "baseline", 0), make_row("modes-short", "dualspeed", 0)]
    rows = [replace(row, max_steps=200) for row in short]
    longer = replace(make_row("modes-long", "dualspeed", 0), max_steps=900)
    sheet = replace(sheet, rows=(*sheet.rows, *rows, longer))
    pairs = dict(with_baseline(sheet, sheet.rows))
    assert (pairs["modes-short"], pairs["modes-0"], pairs["modes-long"]) == ("base-short", "base-0", "base-0")
