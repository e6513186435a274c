"""Numbers that no table can show: Rel. to a Baseline of 0, NaN and inf in the files that tables are made from."""

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dualspeed.errors import ResultsError
from dualspeed.evaluation.bootstrap import interval_of, relative
from dualspeed.layout import TRAINING_RECORD, Layout
from dualspeed.reporting.ablation import gains
from dualspeed.reporting.compare import compare
from dualspeed.reporting.figures.figures import write_figures
from dualspeed.reporting.frames import read_results
from dualspeed.reporting.mlflow_runs import row_metrics
from dualspeed.reporting.report import headline
from dualspeed.reporting.summary import summarise_table
from dualspeed.reporting.table_format import format_gain
from dualspeed.reporting.tables import write_tables
from dualspeed.settings.jobs import write_settings
from tests.support.results_tree import make_row, make_tree, write_score

REL, NO_RATIO = "Rel. %", "Baseline is 0"


@pytest.fixture
def sheet(tmp_path):
    return make_tree(tmp_path / "results")


def tables_command(sheet, folder: Path) -> subprocess.CompletedProcess:
    """`dualspeed tables`, as the workflow calls it."""
    settings = write_settings(sheet, folder / "settings")
    command = [sys.executable, "-m", "dualspeed.cli", "tables", "--settings", str(settings)]
    command += ["--out", str(folder / "tables"), "--figures", str(folder / "figures")]
    return subprocess.run(command, capture_output=True, text=True)


def refusal(sheet, folder: Path) -> str:
    with pytest.raises(ResultsError) as raised:
        write_tables(sheet, folder / "tables")
    return str(raised.value)


def shown(path: Path) -> list[dict[str, str]]:
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_rel_to_a_baseline_that_scored_0_says_so(sheet, tmp_path):
    for name in ("base-0", "base-1"):
        write_score(Layout(sheet.results), name, "gqa", 0)
    done = tables_command(sheet, tmp_path)
    assert done.returncode == 0, done.stderr
    rows = shown(tmp_path / "tables/table1.md")
    rels = {(row["Method"], row["p"]): row[REL] for row in rows}
    assert rels == {
        ("Baseline", "-"): NO_RATIO,
        ("NaivePrune", "0.9"): NO_RATIO,
        ("DualSpeed", "0.75"): "not run",  # and this one was not
        ("DualSpeed", "0.9"): NO_RATIO,
    }
    assert {row["GQA"] for row in rows if row["Method"] == "Baseline"} == {"0.0 ± 0.0"}
    text = (tmp_path / "tables/table1.md").read_text()
    assert "Baseline is 0: the Baseline scored 0 on a benchmark, so no share of its score can be told." in text
    assert NO_RATIO in [row[REL] for row in shown(tmp_path / "tables/table3.md")]
    numbers = list(csv.DictReader((tmp_path / "tables/table1.csv").open()))
    assert {row["rel"] for row in numbers if row["mean"]} == {"inf"}
    assert "textbf{Baseline" not in (tmp_path / "tables/table1.tex").read_text()
    for name in ("figure4", "figure5"):
        assert (tmp_path / f"figures/{name}.svg").stat().st_size > 1000


def test_a_sheet_without_such_a_baseline_has_no_note(sheet, tmp_path):
    write_tables(sheet, tmp_path / "tables")
    assert NO_RATIO not in "".join(path.read_text() for path in (tmp_path / "tables").iterdir())


def test_one_seed_of_two_makes_the_mean_undefined(sheet, tmp_path):
    write_score(Layout(sheet.results), "base-1", "gqa", 0)
    write_tables(sheet, tmp_path)
    rels = {(row["Method"], row["p"]): row[REL] for row in shown(tmp_path / "table1.md")}
    assert rels["DualSpeed", "0.9"] == NO_RATIO and rels["NaivePrune", "0.9"].startswith("50.0 [")
    write_figures(sheet, tmp_path / "figures")


def test_a_baseline_that_scores_0_on_some_draws_has_an_open_interval(sheet, tmp_path):
    write_score(Layout(sheet.results), "base-0", "gqa", 1)
    write_tables(replace(sheet, rows=tuple(row for row in sheet.rows if row.seed == 0)), tmp_path)
    rels = {(row["Method"], row["p"]): row[REL] for row in shown(tmp_path / "table1.md")}
    assert rels["NaivePrune", "0.9"].startswith("2025.0 [") and rels["NaivePrune", "0.9"].endswith(", inf]")
    assert "nan" not in (tmp_path / "table1.md").read_text()


def test_other_readers_of_rel_take_it_too(sheet):
    write_score(Layout(sheet.results), "base-0", "gqa", 0)
    results = read_results(sheet)
    row = next(row for row in sheet.rows if row.id == "ds-0")
    assert "rel" not in row_metrics(results, row) and "score/mean" in row_metrics(results, row)
    assert NO_RATIO in [card["rel"] for card in headline(summarise_table(results, "table1"))]
    assert "Mean, full tokens" in compare(sheet, "ds-0", "base-0")


def test_rel_is_inf_for_nothing_over_nothing_too():
    scores = {("a", "full", "gqa"): np.array([0.0, 1.0]), ("b", "full", "gqa"): np.array([0.0, 2.0])}
    assert relative(scores, [("a", "b")], "full", ["gqa"]).tolist() == [[np.inf, 50.0]]


def test_a_change_from_or_to_a_rel_that_is_undefined_is_undefined():
    rows = pd.DataFrame({"step": [0, 1, 2, 3], "rel": [np.inf, np.inf, 90.0, np.nan]})
    assert [format_gain(gain) for gain in gains(rows)] == ["", NO_RATIO, NO_RATIO, "not run"]


def test_an_interval_without_inf_is_that_of_numpy():
    values = np.random.default_rng(0).normal(size=2001)
    assert interval_of(values).tolist() == np.percentile(values[1:], (2.5, 97.5)).tolist()
    values[1:100] = np.inf
    low, high = interval_of(values)
    assert np.isfinite(low) and high == np.inf


@pytest.mark.parametrize(
    "field, value, message",
    [
        (("percent",), float("nan"), "field 'percent' is nan; valid: a finite number; delete it to have it made again"),
        (("score",), float("inf"), "field 'score' is inf; valid: a finite number"),
        (("metrics", "accuracy"), float("nan"), "field 'metrics.accuracy' is nan; valid: a finite number"),
        (("metrics", "accuracy"), float("-inf"), "field 'metrics.accuracy' is -inf; valid: a finite number"),
        (("metrics", "accuracy"), 10**400, "field 'metrics.accuracy' is too large; valid: a finite number"),
        (
            ("statistics", 3),
            [float("nan"), 1.0],
            "field 'statistics' is no table of numbers, all finite; score it again",
        ),
        (("statistics",), [], "field 'statistics' is no table of numbers, all finite; score it again"),
    ],
)
def test_a_score_that_is_no_number_is_an_error_of_its_file(sheet, tmp_path, field, value, message):
    path = Path(Layout(sheet.results).score("ds-0", "full", "gqa"))
    content = json.loads(path.read_text())
    *parents, last = field
    target = content
    for name in parents:
        target = target[name]
    target[last] = value
    path.write_text(json.dumps(content))
    assert refusal(sheet, tmp_path).startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("fast_step_seconds", float("nan"), "field 'fast_step_seconds' is nan; valid: a finite number"),
        ("fast_step_seconds", 0.0, "field 'fast_step_seconds' is 0.0; valid: above 0"),
        ("theory_u", -1.0, "field 'theory_u' is -1.0; valid: above 0"),
    ],
)
def test_a_step_time_that_is_no_time_is_an_error_of_its_file(sheet, tmp_path, field, value, message):
    path = Path(Layout(sheet.results).speed("p0.9"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    assert refusal(sheet, tmp_path).startswith(f"{path}: {message}")


def test_a_cost_that_is_no_number_is_an_error_of_its_file_and_a_loss_that_is_none_is_not(sheet, tmp_path):
    path = Path(Layout(sheet.results).model("ds-0")) / TRAINING_RECORD
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"final": {"loss": float("nan")}}))
    write_tables(sheet, tmp_path)
    path.write_text(json.dumps(record | {"samples_per_second": float("inf")}))
    done = tables_command(sheet, tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert f"{path}: field 'samples_per_second' is inf; valid: a finite" in done.stderr


def test_rows_without_any_baseline_are_not_run_as_before(sheet, tmp_path):
    rows = (make_row("ds-0", "dualspeed", 0),)
    write_tables(replace(sheet, rows=rows), tmp_path)
    assert shown(tmp_path / "table1.md")[0][REL] == "not run"
