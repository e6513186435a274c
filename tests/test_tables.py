"""Tables, figures and MLflow runs from a results tree made by hand, against numbers worked out by hand."""

import csv
import io
import json
import os
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dualspeed.config import METHODS, DualSpeedConfig
from dualspeed.relative import relative, resample_scores
from dualspeed.results import read_results
from dualspeed.tables import print_table1, write_tables

BENCHMARKS = ["gqa", "scienceqa"]
QUESTIONS = 100
SCORE_COLUMNS = (
    "experiment,model,method,pruner,pruning_ratio,slow_mode_ratio,seed,inference,inference_pruner,"
    "inference_pruning_ratio,benchmark,metric,score,num_questions"
)
SPEED_COLUMNS = (
    "experiment,method,pruner,pruning_ratio,slow_mode_ratio,seed,train_seconds,fast_step_seconds,slow_step_seconds,"
    "baseline_step_seconds,speedup_measured,speedup_theory"
)


def experiment(name, method, seed=0, tables=("table1", "figure4", "figure5"), **cells):
    """A row as the workflow describes it to the tables."""
    pruned = method != "baseline"
    return {
        "id": name,
        "model": "demo",
        "method": method,
        "seed": seed,
        "tables": list(tables),
        "dualspeed": asdict(DualSpeedConfig(**METHODS[method] | cells)),
        "inferences": ["full", "pruned"] if "table2" in tables else ["full"],
        "speed_key": f"p{cells.get('pruning_ratio', 0.9):g}" if pruned else None,
        "pretrain_key": f"{'fast' if pruned else 'full'}-{seed}",
        "settings_hash": f"hash-of-{name}",
    }


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_score(root, name, benchmark, right, inference="full"):
    """A score of `right` per cent: the first questions right, the others wrong."""
    is_right = [1.0 if number < right else 0.0 for number in range(QUESTIONS)]
    content = {
        "benchmark": benchmark,
        "metric": "accuracy",
        "score": right,
        "percent_metric": "accuracy",
        "percent": float(right),
        "num_questions": QUESTIONS,
        "num_missing": 1,
        "metrics": {"accuracy": right, "accuracy on (colours)": 12.5},
        "statistics": [[value, 1.0] for value in is_right],
        "unit_ids": [str(number) for number in range(QUESTIONS)],
        "checksum": f"questions of {benchmark}",
    }
    write(root / "scores" / name / inference / f"{benchmark}.json", content)


def write_training(folder, seconds):
    write(
        folder / "training.json", {"train_seconds": seconds, "samples_per_second": 10.0, "peak_memory_bytes": 1_000_000}
    )


def make_tree(root):
    """Two Baselines and two DualSpeed models of two seeds, NaivePrune, and a model that has not been trained."""
    scores = {"base-0": (80, 60), "base-1": (90, 70), "naive-0": (40, 30), "ds-0": (72, 57), "ds-1": (90, 63)}
    seconds = {"base-0": 300.0, "base-1": 300.0, "naive-0": 100.0, "ds-0": 120.0, "ds-1": 120.0}
    for name, (gqa, scienceqa) in scores.items():
        write_score(root, name, "gqa", gqa)
        write_score(root, name, "scienceqa", scienceqa)
        write_training(root / "models" / name, seconds[name])
    write_score(root, "naive-0", "gqa", 76, "pruned")
    write_score(root, "naive-0", "scienceqa", 54, "pruned")
    write_score(root, "base-0", "gqa", 20, "pruned")
    for key, duration in {"full-0": 60.0, "full-1": 60.0, "fast-0": 30.0, "fast-1": 30.0}.items():
        write_training(root / "pretrain" / key, duration)
    times = {"baseline_step_seconds": 1.0, "fast_step_seconds": 0.25, "slow_step_seconds": 1.1}
    write(root / "speed" / "p0.9.json", times | {"theory_u": 0.2, "pruner_seconds": 0.005})
    shown = ("table1", "table2", "table3", "figure4", "figure5")
    return {
        "sheet": "demo",
        "results": str(root),
        "benchmarks": BENCHMARKS,
        "inference": {"pruner": "random", "pruning_ratio": 0.75},
        "experiments": [
            experiment("ds-0", "dualspeed", 0, ("table1", "table3", "figure4", "figure5")),
            experiment("ds-1", "dualspeed", 1, ("table1", "table3", "figure4", "figure5")),
            experiment("ds-p0.75", "dualspeed", 0, pruning_ratio=0.75),
            experiment("naive-0", "naive_prune", 0, shown),
            experiment("base-0", "baseline", 0, shown),
            experiment("base-1", "baseline", 1),
        ],
    }


@pytest.fixture
def settings(tmp_path):
    """Settings of a tree of the test's own."""
    return make_tree(tmp_path / "results")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A tables folder to read; its figures lie in figures/demo beside."""
    root = tmp_path_factory.mktemp("tree")
    write_tables(make_tree(root / "results"), root / "tables/demo", root / "figures/demo")
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
    assert "ds-0,demo,dualspeed,divprune,0.9,0.1,0,full,,,gqa,accuracy,72,100" in text.splitlines()
    assert "base-0,demo,baseline,,,1,0,full,,,scienceqa,accuracy,60,100" in text.splitlines()
    assert "base-0,demo,baseline,,,1,0,pruned,random,0.75,gqa,accuracy,20,100" in text.splitlines()
    assert "naive-0,demo,naive_prune,divprune,0.9,0,0,pruned,divprune,0.9,gqa,accuracy,76,100" in text.splitlines()
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


def test_slow_steps_without_teacher_cost_no_teacher(settings):
    settings["experiments"][0]["dualspeed"]["distillation_weight"] = 0.0
    speed = read_results(settings).speed.set_index("experiment")
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


def test_table3_finds_its_steps_by_their_settings_and_compares_equal_seeds(settings, tmp_path):
    root = tmp_path / "results"
    for name, config in {"modes": {"num_virtual_tokens": 0, "distillation_weight": 0.0}}.items():
        settings["experiments"].append(experiment(name, "dualspeed", 0, ("table3",), **config))
        write_score(root, name, "gqa", 68)
        write_score(root, name, "scienceqa", 51)
    write_tables(settings, tmp_path / "tables", tmp_path / "figures")
    rows = rows_of(tmp_path / "tables/table3.csv")
    assert [row["rel"][:5] for row in rows] == ["50", "85", "", "92.5"]
    assert [float(row["rel_paper_second_hand"]) for row in rows] == [95.89, 98.88, 99.32, 99.61]
    shown = markdown_rows(tmp_path / "tables/table3.md")
    assert [row["Training"] for row in shown][2:] == ["+ mode isolator", "+ self-distillation"]
    assert [row["Change"] for row in shown] == ["", "+35.00", "not run", "not run"] and shown[2]["Mean"] == "not run"
    assert "second-hand" in (tmp_path / "tables/table3.md").read_text()


def test_latex_is_escaped_and_complete(written):
    text = (written / "table1.tex").read_text()
    assert text.count("\\begin{") == text.count("\\end{") == 2
    assert "Rel. \\%" in text and "$\\pm$" in text and "±" not in text


def test_print_table1_prints_what_was_written(written, capsys):
    print_table1(written)
    assert "DualSpeed" in capsys.readouterr().out


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


def test_experiments_scored_on_different_questions_are_refused(settings, tmp_path):
    path = tmp_path / "results/scores/ds-1/full/gqa.json"
    write(path, json.loads(path.read_text()) | {"checksum": "other"})
    with pytest.raises(ValueError, match=r"ds-1/full/gqa\.json: scored on another question file"):
        read_results(settings)


def test_broken_score_file_is_named(settings, tmp_path):
    (tmp_path / "results/scores/ds-1/full/gqa.json").write_text('{"score": ')
    with pytest.raises(ValueError, match=r"ds-1/full/gqa\.json: not valid JSON"):
        read_results(settings)


def test_figures_are_written_and_the_same_for_the_same_numbers(settings, written, tmp_path):
    folder = written.parent.parent / "figures/demo"
    names = {f"{name}.{kind}" for name in ("figure4", "figure5", "figure_mismatch") for kind in ("png", "svg")}
    assert {path.name for path in folder.iterdir()} == names
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            assert image.width > 800 and len(image.convert("RGB").getcolors(1_000_000)) > 20
    write_tables(settings, tmp_path / "tables/again", tmp_path / "figures/again")
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "figures/again" / name).read_bytes()


def test_nothing_run_yet_gives_tables_and_figures_that_say_so(settings, tmp_path):
    settings["results"] = str(tmp_path / "empty")
    write_tables(settings, tmp_path / "tables", tmp_path / "figures")
    assert len(pd.read_csv(tmp_path / "tables/scores.csv")) == 0
    for name in ("table1", "table2", "table3"):
        assert all(row["Mean"] == "not run" for row in markdown_rows(tmp_path / f"tables/{name}.md"))
    assert (tmp_path / "figures/figure5.png").stat().st_size > 0


def test_rows_reach_mlflow_with_scores_tables_and_config_once(settings, tmp_path):
    from mlflow import MlflowClient

    from dualspeed.tracking import MetricLog, RunSpec

    store = {"uri": f"sqlite:///{tmp_path}/results/mlflow.db", "experiment": "demo"}
    spec = RunSpec("pretrain fast-0", tags={"pretrain_key": "fast-0"})
    with MetricLog(tmp_path / "results/state/abc", None, spec) as log:  # delivered by the tables' job
        log.log(1, {"loss": 1.0}, 1000)
    os.utime(tmp_path / "results/scores/ds-0/full/scienceqa.json", (2_000_000_000, 2_000_000_000))  # its last score
    client = MlflowClient(store["uri"])
    counts = []
    for _ in range(2):
        write_tables(settings, tmp_path / "tables/demo", tmp_path / "figures/demo", store)
        runs = list(client.search_runs([client.get_experiment_by_name("demo").experiment_id]))
        counts.append(len(runs))
    assert counts == [1 + 5 + 13, 1 + 5 + 13]  # pretraining, rows that were trained, their scores
    parents = {run.data.tags["row"]: run for run in runs if run.data.tags["kind"] == "experiment"}
    (pretrain,) = [run for run in runs if run.data.tags["kind"] == "stage"]
    row = parents["ds-0"]
    assert row.info.status == "FINISHED" and row.data.tags["pretrain_run_id"] == pretrain.info.run_id
    assert row.data.params["dualspeed.pruning_ratio"] == "0.9" and row.data.params["method"] == "dualspeed"
    assert row.data.metrics["score/gqa"] == 72 and row.data.metrics["rel"] == pytest.approx(92.5)
    assert row.data.metrics["speedup_measured"] == pytest.approx(2.985, abs=1e-3)
    (point,) = client.get_metric_history(row.info.run_id, "score/gqa")
    assert point.timestamp == 2_000_000_000_000
    assert parents["naive-0"].data.metrics["score_pruned/mean"] == 65
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == row.info.run_id]
    assert {run.info.run_name for run in children} == {"gqa (full)", "scienceqa (full)"}
    assert all(run.data.metrics["accuracy on _colours_"] == 12.5 for run in children)
    artifacts = {
        entry.path
        for folder in ("config", "demo/tables", "demo/figures")
        for entry in client.list_artifacts(row.info.run_id, folder)
    }
    assert {
        "config/experiment.json",
        "config/training.json",
        "demo/tables/table1.md",
        "demo/figures/figure5.png",
    } <= artifacts


def test_store_away_costs_tables_one_warning(settings, tmp_path, caplog):
    away = {"uri": "http://127.0.0.1:9", "experiment": "demo"}
    write_tables(settings, tmp_path / "tables/demo", tmp_path / "figures/demo", away)
    assert len(caplog.records) == 1 and (tmp_path / "tables/demo/table1.md").exists()


def test_importing_tables_loads_neither_torch_nor_mlflow():
    code = "import sys, dualspeed.tables; print(sorted({'torch', 'transformers', 'mlflow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
