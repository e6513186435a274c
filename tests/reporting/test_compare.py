"""Comparison of two rows of a made-up sheet."""

import re

import numpy as np
import pytest

from dualspeed.cli import main
from dualspeed.errors import ConfigError
from dualspeed.reporting.compare import compare
from tests.support.results_tree import make_tree


@pytest.fixture(scope="module")
def sheet(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("compare") / "results")


def lines_of(text):
    """{label: cells after it}; cells are two or more spaces apart."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if line.strip()]
    return {row[0]: row[1:] for row in rows}


def test_settings_scores_and_costs_of_two_rows(sheet):
    lines = lines_of(compare(sheet, "base-0", "ds-0"))
    assert lines["method"] == ["baseline", "dualspeed"]
    assert lines["slow_mode_ratio"] == ["1", "0.1"]
    assert "seed" not in lines and "model" not in lines  # they are the same
    assert lines["GQA, full tokens"][0].startswith("80.0 [") and lines["GQA, full tokens"][1].startswith("72.0 [")
    assert lines["GQA, full tokens"][2].startswith("-8.0 [")
    assert lines["Mean, full tokens"][2].startswith("-5.5 [")
    assert lines["GQA, pruned tokens"][0].startswith("20.0 [") and lines["GQA, pruned tokens"][1] == "not run"
    assert lines["Training, wall clock (min)"] == ["6.0", "2.5", "0.42x"]
    assert lines["Speedup over Baseline (x)"][1] == "2.99"


def test_difference_is_paired_over_the_same_questions(sheet):
    """base-0 and ds-0 differ on 8 of 100 questions only, so the difference has the error of these 8 alone."""
    cells = lines_of(compare(sheet, "base-0", "ds-0"))["GQA, full tokens"]
    widths = [np.diff([float(end) for end in re.search(r"\[(.*), (.*)\]", cell).groups()])[0] for cell in cells]
    # Standard errors of 80 %, of 72 %, and of a difference in 8 of 100 questions.
    errors = [np.sqrt(p * (1 - p) / 100) * 100 for p in (0.80, 0.72, 0.08)]
    assert widths == pytest.approx([2 * 1.96 * error for error in errors], rel=0.1)


def test_a_row_with_itself_and_an_unknown_row_are_refused(sheet):
    with pytest.raises(ConfigError, match="'ds-0' twice"):
        compare(sheet, "ds-0", "ds-0")
    with pytest.raises(ConfigError, match=r"row: 'ds0' is unknown .*; valid: base-0, base-1, ds-0"):
        compare(sheet, "ds0", "base-0")


def test_rows_without_results_say_so(sheet):
    text = compare(sheet, "ds-p0.75", "ds-0")
    assert lines_of(text)["GQA, full tokens"][0] == "not run"


def test_command_compares_rows_of_the_demos_sheet(capsys):
    rows = ["baseline-seed0", "dualspeed-divprune-p0.9-seed0"]
    assert main(["compare", *rows]) == 0
    assert lines_of(capsys.readouterr().out)["method"] == ["baseline", "dualspeed"]
    assert main(["compare", "baseline-seed0", "none"]) == 1
    assert "row: 'none' is unknown" in capsys.readouterr().err
