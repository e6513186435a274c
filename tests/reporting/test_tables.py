"""Tables and figures of a made-up sheet, compared with numbers worked out by hand."""

import csv
import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from markdown_it import MarkdownIt
from PIL import Image

from dualspeed.errors import ResultsError
from dualspeed.evaluation.bootstrap import relative, resample_scores
from dualspeed.layout import Layout
from dualspeed.reporting import paper
from dualspeed.reporting.figures.figures import write_figures
from dualspeed.reporting.figures.learning_curves import read_curve, read_validation
from dualspeed.reporting.figures.question_types import accuracy_by_type
from dualspeed.reporting.frames import read_results
from dualspeed.reporting.summary import rows_in, summarise_table, typical_rows
from dualspeed.reporting.table_format import escape
from dualspeed.reporting.tables import write_tables
from dualspeed.settings.names import in_paper_order
from dualspeed.settings.sheet import Sheet
from tests.support.results_tree import QUESTIONS, change_rows, make_row, make_tree, write, write_score

SCORE_COLUMNS = (
    "experiment,model,method,pruner,pruning_ratio,slow_mode_ratio,seed,inference,inference_pruner,"
    "inference_pruning_ratio,benchmark,metric,score,num_questions,slow_steps,max_steps"
)
SPEED_COLUMNS = (
    "experiment,method,pruner,pruning_ratio,slow_mode_ratio,seed,train_seconds,fast_step_seconds,slow_step_seconds,"
    "baseline_step_seconds,speedup_measured,speedup_theory,slow_steps,max_steps"
)


@pytest.fixture
def sheet(tmp_path) -> Sheet:
    """Sheet whose results the test may change."""
    return make_tree(tmp_path / "results")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """Folder of the tables, not to be changed; the figures are in figures/demo beside it."""
    root = tmp_path_factory.mktemp("tree")
    sheet = make_tree(root / "results")
    write_tables(sheet, root / "tables/demo")
    write_figures(sheet, root / "figures/demo")
    return root / "tables/demo"


def rows_of(path):
    return list(csv.DictReader(io.StringIO(path.read_text())))


def markdown_rows(path):
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_scores_has_the_agreed_columns_and_plain_numbers(written):
    text = (written / "scores.csv").read_text()
    assert text.splitlines()[0] == SCORE_COLUMNS
    assert "ds-0,demo,dualspeed,divprune,0.9,0.1,0,full,,,gqa,accuracy,72,100,," in text.splitlines()
    assert "base-0,demo,baseline,,,1,0,full,,,scienceqa,accuracy,60,100,," in text.splitlines()
    assert "base-0,demo,baseline,,,1,0,pruned,random,0.75,gqa,accuracy,20,100,," in text.splitlines()
    assert "naive-0,demo,naive_prune,divprune,0.9,0,0,pruned,divprune,0.9,gqa,accuracy,76,100,," in text.splitlines()
    assert len(text.splitlines()) == 1 + 10 + 3 and "ds-p0.75" not in text


def test_scores_detail_holds_every_metric(written):
    rows = [row for row in rows_of(written / "scores_detail.csv") if row["experiment"] == "ds-1"]
    values = {(row["benchmark"], row["metric"]): row["value"] for row in rows}
    assert values["gqa", "accuracy on (colours)"] == "12.5" and values["gqa", "num_missing"] == "1"


def test_speed_follows_the_formulas(written):
    assert (written / "speed.csv").read_text().splitlines()[0] == SPEED_COLUMNS
    rows = {row["experiment"]: row for row in rows_of(written / "speed.csv")}
    assert float(rows["ds-0"]["speedup_measured"]) == pytest.approx(1 / (0.9 * 0.25 + 0.1 * 1.1))
    assert float(rows["ds-0"]["speedup_theory"]) == pytest.approx(1 / (0.9 * 0.2 + 0.1 * (1 + 0.2 / 3)))
    assert float(rows["naive-0"]["speedup_measured"]) == 4 and float(rows["naive-0"]["speedup_theory"]) == 5
    assert rows["ds-0"]["train_seconds"] == "120" and rows["ds-0"]["fast_step_seconds"] == "0.25"
    baseline = rows["base-0"]
    assert (baseline["pruner"], baseline["pruning_ratio"], baseline["fast_step_seconds"]) == ("", "", "")
    assert (baseline["speedup_measured"], baseline["speedup_theory"]) == ("1", "1")
    assert rows["ds-p0.75"]["speedup_measured"] == rows["ds-p0.75"]["train_seconds"] == ""


def test_slow_steps_without_teacher_cost_no_teacher(sheet):
    first, *others = sheet.rows
    first = replace(first, dualspeed=replace(first.dualspeed, distillation_weight=0.0))
    speed = read_results(replace(sheet, rows=(first, *others))).speed.set_index("experiment")
    assert speed.loc["ds-0", "speedup_theory"] == pytest.approx(1 / (0.9 * 0.2 + 0.1))


def test_table1_gives_means_deviations_and_rel_in_the_papers_order(written):
    rows = rows_of(written / "table1.csv")
    assert [(row["method"], row["pruning_ratio"]) for row in rows] == [
        ("baseline", ""),
        ("naive_prune", "0.9"),
        ("dualspeed", "0.75"),
        ("dualspeed", "0.9"),
    ]
    dualspeed = {
        key: float(value)
        for key, value in rows[3].items()
        if value and key[0] in "gsrtmp" and key != "pruner" and key not in ("model", "method")
    }
    assert dualspeed["gqa"] == 81 and dualspeed["gqa_std"] == pytest.approx(18 / 2**0.5)
    assert dualspeed["mean"] == (64.5 + 76.5) / 2 and dualspeed["mean_std"] == pytest.approx(12 / 2**0.5)
    # seed 0: (72/80 + 57/60) / 2 = 92.5 %, seed 1: (90/90 + 63/70) / 2 = 95 %
    assert dualspeed["rel"] == pytest.approx(93.75) and dualspeed["rel_std"] == pytest.approx(2.5 / 2**0.5)
    assert dualspeed["rel_low"] < 93.75 < dualspeed["rel_high"]
    assert dualspeed["train_hours"] == pytest.approx(150 / 3600) and dualspeed["pruner_share"] == pytest.approx(0.02)
    assert float(rows[1]["rel"]) == pytest.approx(50) and rows[1]["rel_std"] == ""
    assert [rows[0][key] for key in ("rel", "rel_low", "rel_high")] == ["100", "100", "100"]


def test_table1_shows_mme_in_points_and_scores_keeps_its_accuracy(sheet, tmp_path):
    sheet = replace(sheet, benchmarks=("gqa", "mme"))
    for row, (points, percent) in {"base-0": (1500, 75), "ds-0": (1450, 72), "ds-1": (1350.5, 70)}.items():
        path = tmp_path / f"results/scores/{row}/full/mme.json"
        write_score(Layout(sheet.results), row, "mme", percent)
        write(path, json.loads(path.read_text()) | {"metric": "perception", "score": points, "percent_metric": "acc"})
    write_tables(sheet, tmp_path / "tables")
    shown = {(row["Method"], row["p"]): row for row in markdown_rows(tmp_path / "tables/table1.md")}
    assert shown["DualSpeed", "0.9"]["MME"].replace("*", "") == "1400.2 ± 70.4"
    assert shown["Baseline", "-"]["MME"] == "1500.0" and shown["NaivePrune", "0.9"]["MME"] == "not run"
    assert "MME: points of perception" in (tmp_path / "tables/table1.md").read_text()
    numbers = {(row["method"], row["pruning_ratio"]): row for row in rows_of(tmp_path / "tables/table1.csv")}
    assert numbers["dualspeed", "0.9"]["mme_perception"] == "1400.25" and numbers["dualspeed", "0.9"]["mme"] == "71"
    scores = [row for row in rows_of(tmp_path / "tables/scores.csv") if row["benchmark"] == "mme"]
    assert {(row["experiment"], row["metric"], row["score"]) for row in scores} == {
        *(("base-0", "acc", "75"), ("ds-0", "acc", "72"), ("ds-1", "acc", "70")),
    }


def test_what_has_not_run_is_empty_and_says_so(written):
    row = rows_of(written / "table1.csv")[2]
    assert [row[key] for key in ("gqa", "mean", "rel", "speedup_measured", "train_hours")] == [""] * 5
    assert row["not_run"] == "ds-p0.75: gqa; ds-p0.75: scienceqa"
    shown = markdown_rows(written / "table1.md")
    assert {shown[2][column] for column in ("GQA", "SQA", "Mean", "Rel. %", "Speedup", "Train (min)")} == {"not run"}
    assert shown[3]["GQA"] == "81.0 ± 12.7" and shown[3]["Speedup"] == "2.99x" and shown[3]["Train (min)"] == "2.5"
    assert shown[0]["Pruner"] == shown[0]["p"] == shown[0]["In pruner"] == "-"


def test_table2_sets_full_against_pruned_inference(written):
    rows = {(row["method"], row["inference"]): row for row in rows_of(written / "table2.csv")}
    assert set(rows) == {
        (method, inference) for method in ("baseline", "naive_prune") for inference in ("full", "pruned")
    }
    assert float(rows["naive_prune", "full"]["rel"]) == pytest.approx(50)
    assert float(rows["naive_prune", "pruned"]["rel"]) == pytest.approx(100 * (76 / 80 + 54 / 60) / 2)
    assert rows["baseline", "pruned"]["gqa"] == "20" and rows["baseline", "pruned"]["mean"] == ""


def test_table3_finds_its_steps_by_their_settings_and_compares_equal_seeds(sheet, tmp_path):
    modes = make_row("modes", "dualspeed", 0, ("table3",), num_virtual_tokens=0, distillation_weight=0.0)
    write_score(Layout(sheet.results), "modes", "gqa", 68)
    write_score(Layout(sheet.results), "modes", "scienceqa", 51)
    write_tables(replace(sheet, rows=(*sheet.rows, modes)), tmp_path / "tables")
    rows = rows_of(tmp_path / "tables/table3.csv")
    assert [row["rel"][:5] for row in rows] == ["50", "85", "", "92.5"]
    assert [float(row["rel_paper"]) for row in rows] == [95.89, 98.88, 99.32, 99.61]
    assert {row["rel_paper_certainty"] for row in rows} == {"medium"}
    shown = markdown_rows(tmp_path / "tables/table3.md")
    assert [row["Training"] for row in shown][2:] == ["+ mode isolator", "+ self-distillation"]
    assert [row["Change"].split(" [")[0] for row in shown] == ["", "+35.00", "not run", "not run"]
    assert shown[2]["Mean"] == "not run"
    assert "second-hand" in (tmp_path / "tables/table3.md").read_text()


def test_table3_shows_the_papers_numbers_beside_the_papers_r_alone(sheet, tmp_path):
    others = [
        make_row("twice", "dualspeed", 0, ("table3",), slow_mode_ratio=0.2),
        make_row("counted", "dualspeed", 0, ("table3",), slow_steps=40),
    ]
    write_tables(replace(sheet, rows=(*sheet.rows, *others)), tmp_path / "tables")
    rows = [row for row in rows_of(tmp_path / "tables/table3.csv") if row["step"] == "3"]
    assert {(row["slow_mode_ratio"], row["slow_steps"]): row["rel_paper"] for row in rows} == {
        ("0.1", ""): "99.61",
        ("0.2", ""): "",
        ("", "40"): "",
    }


def test_columns_stand_in_the_papers_order_whatever_the_configuration_says(sheet, tmp_path):
    write_tables(replace(sheet, benchmarks=("scienceqa", "gqa")), tmp_path / "tables")
    columns = list(markdown_rows(tmp_path / "tables/table1.md")[0])
    assert columns.index("GQA") < columns.index("SQA") < columns.index("Mean")
    assert in_paper_order(["x", "vizwiz", "mme", "pope", "vqav2"]) == ["vqav2", "pope", "mme", "vizwiz", "x"]


def test_vizwiz_is_shown_but_not_in_the_papers_mean(sheet, tmp_path):
    results = read_results(sheet)
    without = summarise_table(results, "table1")
    with_vizwiz = replace(sheet, benchmarks=("vizwiz", "gqa", "scienceqa"))
    draws = results.draws | {("base-0", "full", "vizwiz"): np.zeros(2001)}
    rows = summarise_table(replace(results, sheet=with_vizwiz, draws=draws), "table1")
    assert rows["vizwiz"][0] == 0
    pd.testing.assert_frame_equal(rows[["mean", "rel"]], without[["mean", "rel"]])


def test_the_papers_numbers_stand_beside_its_own_models_and_settings_alone(sheet, tmp_path):
    write_tables(sheet, tmp_path / "tables")
    assert "(paper)" not in (tmp_path / "tables/table1.md").read_text().split("Rel.:")[0]
    write_tables(change_rows(sheet, model="llava-1.5-7b"), tmp_path / "tables")
    shown = markdown_rows(tmp_path / "tables/table1.md")
    assert [row["Rel. % (paper)"] for row in shown] == ["", "", "", "99.61 (medium)"]
    assert [row["Speedup (paper)"] for row in shown] == ["", "", "", "2.1 (certain)"]
    row = rows_of(tmp_path / "tables/table1.csv")[3]
    assert (row["speedup_paper"], row["rel_paper_certainty"]) == ("2.1", "medium")
    assert "\\textcolor{gray}{99.61 (medium)}" in (tmp_path / "tables/table1.tex").read_text()
    assert paper.NOTE in (tmp_path / "tables/table1.md").read_text()
    assert paper.MISMATCH_NOTE in (tmp_path / "tables/table2.md").read_text()


def test_speed_table_says_how_near_the_limit_a_run_is_and_what_it_costs(sheet, tmp_path):
    for folder in ("models/ds-0", "pretrain/fast-0"):
        path = tmp_path / "results" / folder / "training.json"
        write(path, json.loads(path.read_text()) | {"device": "cuda", "num_processes": 8})
    write_tables(sheet, tmp_path / "tables")
    rows = rows_of(tmp_path / "tables/table_speed.csv")
    (row,) = [row for row in rows if row["method"] == "dualspeed" and row["pruning_ratio"] == "0.9"]
    measured, limit = 1 / (0.9 * 0.25 + 0.1 * 1.1), 1 / (0.9 * 0.2 + 0.1 * (1 + 0.2 / 3))
    assert float(row["share_of_limit"]) == pytest.approx(measured / limit)
    assert float(row["gpu_hours"]) == pytest.approx(8 * (120 + 30) / 3600)
    shown = markdown_rows(tmp_path / "tables/table_speed.md")
    assert [row["u"] for row in shown] == ["-", "0.200", "not run", "0.200"]
    assert [row["GPU hours"] for row in shown] == ["-", "-", "-", "0.3"]


def test_best_of_each_column_is_bold_and_what_it_is_compared_with_is_not(written):
    text = (written / "table1.tex").read_text()
    (dualspeed,) = [line for line in text.splitlines() if "81.0" in line]
    assert "\\textbf{81.0 $\\pm$ 12.7}" in dualspeed and "\\textbf{93.8" in dualspeed
    (baseline,) = [line for line in text.splitlines() if line.startswith("Baseline")]
    assert "textbf" not in baseline and "\\textcolor{gray}{not run}" in text
    naive = [line for line in (written / "table2.tex").read_text().splitlines() if line.startswith("NaivePrune")]
    assert ["\\textbf{76.0}" in line for line in naive] == [False, True]


def test_latex_is_escaped_and_complete(written):
    text = (written / "table1.tex").read_text()
    assert text.count("\\begin{") == text.count("\\end{") == 2
    assert "Rel. \\%" in text and "$\\pm$" in text and "±" not in text
    assert escape("50 % & a_b #1 {x} ~ ^ \\ $") == (
        "50 \\% \\& a\\_b \\#1 \\{x\\} \\textasciitilde{} \\textasciicircum{} \\textbackslash{} \\$"
    )


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex: tables were not compiled")
def test_latex_tables_compile_in_a_small_document(sheet, tmp_path):
    others = change_rows(sheet, model="llava-1.5-7b").rows
    write_tables(replace(sheet, rows=sheet.rows + others), tmp_path / "tables")
    inputs = "\n".join(f"\\input{{tables/{path.stem}}}" for path in sorted(tmp_path.glob("tables/*.tex")))
    packages = "\\usepackage{booktabs,graphicx,xcolor}"
    document = f"\\documentclass{{article}}\n{packages}\n\\begin{{document}}\n{inputs}\n\\end{{document}}\n"
    (tmp_path / "all.tex").write_text(document)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "all.pdf").stat().st_size > 10_000
    assert "Overfull" not in done.stdout and "Missing character" not in done.stdout


def test_markdown_renders_as_tables(written):
    for path in sorted(written.glob("*.md")):
        html = MarkdownIt("commonmark").enable("table").render(path.read_text())
        cells = [html.count(f"<{tag}") for tag in ("table", "th ", "td ")]
        shown = markdown_rows(path)
        assert cells == [1, len(shown[0]), len(shown) * len(shown[0])], path.name
        assert html.startswith("<p><strong>") and html.count("<p>") >= 2 and "|" not in html


def test_bootstrap_draws_the_same_questions_for_both_models():
    right = np.zeros((QUESTIONS, 2))
    right[:, 1], right[:70, 0] = 1, 1
    half = right.copy()
    half[:35, 0] = 0  # right on half of what the other is right on
    scores = resample_scores({("a", "full", "gqa"): right, ("b", "full", "gqa"): right, ("c", "full", "gqa"): half})
    drawn = scores["a", "full", "gqa"][1:]
    assert scores["a", "full", "gqa"][0] == pytest.approx(70)
    assert drawn.std() == pytest.approx(100 * (0.7 * 0.3 / QUESTIONS) ** 0.5, rel=0.1)
    (same,) = relative(scores, [("b", "a")], "full", ["gqa"])
    assert (same == 100).all()
    (half_as_good,) = relative(scores, [("c", "a")], "full", ["gqa"])
    assert half_as_good[0] == pytest.approx(50)
    low, high = np.percentile(half_as_good[1:], [2.5, 97.5])
    # Of the 70 questions that the first is right on, the second is right on half: a binomial share of about 70 draws.
    assert (50 - low, high - 50) == pytest.approx([1.96 * 100 * (0.25 / 70) ** 0.5] * 2, abs=2)


def test_experiments_scored_on_different_questions_are_refused(sheet, tmp_path):
    path = tmp_path / "results/scores/ds-1/full/gqa.json"
    write(path, json.loads(path.read_text()) | {"checksum": "other"})
    with pytest.raises(ResultsError, match=r"ds-1/full/gqa\.json: scored on another question file"):
        read_results(sheet)


def test_broken_score_file_is_named(sheet, tmp_path):
    (tmp_path / "results/scores/ds-1/full/gqa.json").write_text('{"score": ')
    with pytest.raises(ResultsError, match=r"ds-1/full/gqa\.json: not valid JSON"):
        read_results(sheet)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([], "no JSON object"),
        ({"checksum": None}, "field 'checksum' is missing or no str"),
        ({"statistics": [[1.0], [1.0, 2.0]]}, "field 'statistics' is no table of numbers"),
        ({"statistics": [1.0]}, "field 'statistics' is no table of numbers"),
        ({"statistics": [[1.0, 1.0]]}, r"statistics of shape \(1, 2\), others have \(100, 2\)"),
    ],
)
def test_score_file_without_a_field_is_named(content, problem, sheet, tmp_path):
    path = tmp_path / "results/scores/ds-1/full/gqa.json"
    write(path, json.loads(path.read_text()) | content if content else content)
    with pytest.raises(ResultsError, match=rf"ds-1/full/gqa\.json: {problem}"):
        read_results(sheet)


@pytest.mark.parametrize("file", ["models/ds-1/training.json", "pretrain/fast-0/training.json", "speed/p0.9.json"])
def test_broken_record_of_training_or_speed_is_named(file, sheet, tmp_path):
    write(tmp_path / "results" / file, {"train_seconds": "long"})
    with pytest.raises(ResultsError, match=rf"{file}: field '\w+' is missing or no float"):
        read_results(sheet)


def test_ids_of_the_rows_are_tuples_until_the_csv_joins_them(sheet, written):
    rows = summarise_table(read_results(sheet), "table1")
    full = rows[rows["inference"] == "full"]
    assert list(full["experiments"]) == [("base-0", "base-1"), ("naive-0",), ("ds-p0.75",), ("ds-0", "ds-1")]
    shown = [row["experiments"] for row in rows_of(written / "table1.csv")]
    assert shown == ["base-0; base-1", "naive-0", "ds-p0.75", "ds-0; ds-1"]


def test_figures_are_written_and_the_same_for_the_same_numbers(sheet, written, tmp_path):
    folder = written.parent.parent / "figures/demo"
    more = ("mismatch", "speedup", "question_types", "learning_curves")
    drawn = ["figure4", "figure5", *(f"figure_{name}" for name in more)]
    names = {f"{name}.{kind}" for name in drawn for kind in ("png", "svg")}
    assert {path.name for path in folder.iterdir()} == names
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            assert image.width > 800 and len(image.convert("RGB").getcolors(1_000_000)) > 20
    write_figures(sheet, tmp_path / "figures/again")
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "figures/again" / name).read_bytes()


def test_learning_curve_counts_the_time_that_was_trained(sheet, tmp_path):
    folder = tmp_path / "results/models/ds-0"
    curve = read_curve(folder)
    assert list(curve["step"]) == list(range(1, 11))
    assert curve["seconds"].iloc[-1] == pytest.approx(120) and curve["seconds"].iloc[0] == pytest.approx(12)
    assert list(curve["fast/ce_loss"]) == [0.5**step for step in range(1, 11)] and curve["slow/ce_loss"].isna().all()
    with (folder / "metrics.jsonl").open("a") as file:
        for step, accuracy in ((5, 40.0), (10, 70.0)):
            metrics = {"validation/answer_accuracy": accuracy, "validation/seconds": 1.0}
            file.write(json.dumps({"step": step, "time": 0, "metrics": metrics}) + "\n")
        file.write('{"step": 11, "ti')
    validation = read_validation(folder)
    assert list(validation["validation/answer_accuracy"]) == [40, 70]
    assert list(validation["seconds"]) == pytest.approx([60, 120])
    pd.testing.assert_frame_equal(read_curve(folder), curve)
    assert read_curve(tmp_path / "results/models/ds-p0.75").empty
    assert read_validation(tmp_path / "results/models/ds-p0.75").empty


def test_accuracy_by_type_is_the_mean_over_seeds(sheet):
    results = read_results(sheet)
    table = accuracy_by_type(results, typical_rows(summarise_table(results, "table1")))
    assert list(table.index) == ["GQA: open", "GQA: binary", "SQA: open", "SQA: binary"]
    assert table.loc["GQA: binary"].to_dict() == {"baseline": 70, "naive_prune": 0, "dualspeed": 62}


def test_typical_rows_have_the_settings_that_most_experiments_share(sheet):
    rows = summarise_table(read_results(sheet), "table1")
    typical = typical_rows(rows[rows["inference"] == "full"])
    assert list(typical["method"]) == ["baseline", "naive_prune", "dualspeed"]
    assert list(typical["pruning_ratio"])[1:] == [0.9, 0.9]
    assert [row.id for row in rows_in(sheet, typical)] == ["ds-0", "ds-1", "naive-0", "base-0", "base-1"]


def test_typical_rows_have_a_number_of_slow_steps_or_a_share_of_them(sheet, tmp_path):
    """One row with a share and one with each of two numbers: no line has neither."""
    rows = [row for row in sheet.rows if row.method != "dualspeed"]
    numbers = [make_row(f"n{count}", "dualspeed", 0, ("table1",), slow_steps=count) for count in (20, 40)]
    mixed = replace(sheet, rows=(*rows, make_row("ds-0", "dualspeed", 0, ("table1",)), *numbers))
    typical = typical_rows(summarise_table(read_results(mixed), "table1"))
    assert [row.id for row in rows_in(mixed, typical)][-1] == "n40"
    write_tables(mixed, tmp_path / "tables")
    shown = [row for row in markdown_rows(tmp_path / "tables/table1.md") if row["Method"] == "DualSpeed"]
    assert sorted((row["r"], row["Slow steps"]) for row in shown) == [("-", "20"), ("-", "40"), ("0.1", "-")]
    write_figures(mixed, tmp_path / "figures")
    assert (tmp_path / "figures/figure5.png").stat().st_size > 0


def test_nothing_run_yet_gives_tables_and_figures_that_say_so(sheet, tmp_path):
    sheet = replace(sheet, results=str(tmp_path / "empty"))
    write_tables(sheet, tmp_path / "tables")
    write_figures(sheet, tmp_path / "figures")
    assert len(pd.read_csv(tmp_path / "tables/scores.csv")) == 0
    for name in ("table1", "table2", "table3"):
        assert all(row["Mean"] == "not run" for row in markdown_rows(tmp_path / f"tables/{name}.md"))
    assert (tmp_path / "figures/figure5.png").stat().st_size > 0


def test_importing_tables_loads_neither_torch_nor_mlflow():
    code = (
        "import sys, dualspeed.reporting.tables; print(sorted({'torch', 'transformers', 'mlflow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
