"""lmms-eval's scores beside ours; a stub package writes a results file in lmms-eval's format."""

import csv
import json
import os
import subprocess
import sys

import pytest

from dualspeed.errors import ConfigError
from dualspeed.evaluation.lmms_eval import compare, read_lmms_results, run_lmms_eval
from dualspeed.files import write_json

STAND_IN = """
import json, pathlib, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
values = {
    "gqa": {"alias": "gqa", "exact_match,none": 0.5, "exact_match_stderr,none": 0.01},
    "mme": {"alias": "mme", "mme_percetion_score,none": 1500.5, "mme_percetion_score_stderr,none": "N/A"},
}
folder = pathlib.Path(options["--output_path"]) / "model__folder"
folder.mkdir(parents=True)
results = {task: values[task] for task in options["--tasks"].split(",")}
(folder / "20260101_000000_results.json").write_text(json.dumps({"results": results, "config": options}))
"""


def write_scores(folder):
    for name, metrics in {
        "gqa": {"accuracy": 49.0, "accuracy_lmms_eval": 49.5},
        "mme": {"perception": 1490.0, "perception_lmms_eval": 1501.0},
        "mmbench_cn": {"accuracy": 40.0},
    }.items():
        metric = next(iter(metrics))
        content = {"benchmark": name, "metric": metric, "score": metrics[metric], "metrics": metrics}
        write_json(folder / f"{name}.json", content)


def test_the_command_runs_lmms_eval_and_puts_its_numbers_beside_ours(tmp_path):
    (tmp_path / "site" / "lmms_eval").mkdir(parents=True)
    (tmp_path / "site" / "lmms_eval" / "__init__.py").write_text("")
    (tmp_path / "site" / "lmms_eval" / "__main__.py").write_text(STAND_IN)
    write_scores(tmp_path / "scores")
    command = [sys.executable, "-m", "dualspeed.cli", "lmms", "--model", "model", "--scores", tmp_path / "scores"]
    command += ["--work", tmp_path / "work", "--out", tmp_path / "out.csv", "--batch-size", "4"]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(tmp_path / "site")})
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert [(row["benchmark"], row["ours"], row["ours_by_same_rule"], row["lmms_eval"]) for row in rows] == [
        ("gqa", "49.0", "49.5", "50.0"),
        ("mme", "1490.0", "1501.0", "1500.5"),
    ]
    (results,) = (tmp_path / "work").rglob("*_results.json")
    config = json.loads(results.read_text())["config"]
    assert config["--model"] == "llava_hf" and config["--model_args"] == "pretrained=model"
    assert (config["--tasks"], config["--batch_size"]) == ("gqa,mme", "4")


def test_what_lmms_eval_has_not_given_is_empty(tmp_path):
    write_scores(tmp_path / "scores")
    write_json(tmp_path / "lmms" / "x_results.json", {"results": {"mme": {"mme_percetion_score,none": "N/A"}}})
    rows = compare(tmp_path / "scores", tmp_path / "lmms", tmp_path / "out.csv")
    assert [(row["benchmark"], row["lmms_eval"]) for row in rows] == [("gqa", None), ("mme", None)]


def test_what_lacks_is_one_clear_error(tmp_path):
    with pytest.raises(ConfigError, match="lmms-eval is not installed"):
        run_lmms_eval("model", ["gqa"], tmp_path, 1)
    with pytest.raises(ConfigError, match="lmms-eval is run for none of mmbench_cn; valid: vqav2"):
        run_lmms_eval("model", ["mmbench_cn"], tmp_path, 1)
    with pytest.raises(ConfigError, match=r"lmms-eval left no \*_results\.json"):
        read_lmms_results(tmp_path)
