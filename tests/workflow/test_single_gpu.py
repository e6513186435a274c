"""config/single-gpu from download to report: real recipes and processors, tiny models and files, a local server."""

import csv
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dualspeed.cli import main
from tests.support import single_gpu
from tests.support.http_server import HTTPServer
from tests.support.single_gpu import CAULDRON, LIMIT, NUM_ROWS, NUM_STEPS, QUESTIONS, SUBSETS
from tests.support.workflow import copy_project, edit_config, edit_rows, plan

pytest.importorskip("torchvision")

pytestmark = [pytest.mark.slow, pytest.mark.torchvision]
OWN = ("--configfile", "config/single-gpu/config.yaml")
QWEN, SMOLVLM = "qwen2.5-vl-3b", "smolvlm-256m"
BASELINE, DUALSPEED, NAIVE = ROWS = (
    f"{QWEN}-baseline",
    f"{QWEN}-dualspeed-divprune-p0.9",
    f"{SMOLVLM}-naive_prune-divprune-p0.9",
)


def choose_rows(rows: dict[str, dict]) -> None:
    """Keep ROWS; every second step of the DualSpeed row is slow."""
    for name in set(rows) - set(ROWS):
        del rows[name]
    rows[DUALSPEED]["slow_mode_ratio"] = "0.5"


def run(project: Path, server: HTTPServer, home: Path) -> str:
    """Output of Snakemake's run of everything."""
    command = [sys.executable, "-m", "snakemake", *OWN, "--cores", "2"]
    environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=1500)
    logs = "".join(f"\n== {log}\n{log.read_text()[-1500:]}" for log in project.glob("results/logs/**/*.log"))
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:] + (logs if len(logs) < 9000 else logs[-9000:])
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder of a project that was run whole, and the commit of the_cauldron that it read."""
    root = tmp_path_factory.mktemp("single-gpu")
    (root / "project").mkdir()
    project, served = copy_project(root / "project"), root / "served"
    single_gpu.serve(served, root / "scratch")
    (project / "data/by-hand").mkdir(parents=True)
    shutil.copy(root / "scratch/eval.zip", project / "data/by-hand")
    edit_rows(choose_rows, name="single-gpu")(project)
    with HTTPServer(served) as server:
        (project / "config/single-gpu/config.yaml").write_text(
            yaml.safe_dump(single_gpu.config_in_small(server), sort_keys=False)
        )
        run(project, server, root / "home")
        commit = server.commit(served / "hub/datasets" / CAULDRON)
        read = [request.path for request in server.requests if request.path.endswith(".parquet")]
    return project, commit, read


def test_the_rows_are_read_from_the_hub(finished):
    project, commit, read = finished
    assert {path.split("/")[-2] for path in read} == set(SUBSETS) and all(commit in path for path in read)
    assert set(json.loads((project / "config/single-gpu/data.lock").read_text())) == {QWEN, SMOLVLM, "benchmarks"}
    for model in (QWEN, SMOLVLM):
        manifest = json.loads((project / f"results/prepared/{model}/finetune/manifest.json").read_text())
        counts = {source["source"]: (source["commit"], source["num_samples"]) for source in manifest["sources"]}
        assert counts == {
            f"data[{number}] {CAULDRON}/{name}": (commit, LIMIT if name == "textvqa" else NUM_ROWS)
            for number, name in enumerate(SUBSETS)
        }
        assert manifest["num_dropped"] == 0


def test_every_benchmark_is_answered_and_scored(finished):
    project = finished[0]
    for row, (name, questions) in itertools.product(ROWS, QUESTIONS.items()):
        answers = (project / f"results/answers/{row}/full/{name}.jsonl").read_text().splitlines()
        answered = [json.loads(line)["question_id"] for line in answers]
        asked = asked_ids(project / f"data/eval/{name}/{questions}")
        assert sorted(answered) == sorted(asked * 2 if name == "textvqa" else asked)  # with OCR tokens and without
        score = json.loads((project / f"results/scores/{row}/full/{name}.json").read_text())
        assert (score["num_questions"], score["num_missing"]) == (len(asked), 0)
        assert 0 <= score["percent"] <= 100


def asked_ids(file: Path) -> list:
    """Ids of the questions of a file of LLaVA's, those with an image."""
    if file.suffix == ".json":
        return [question["id"] for question in json.loads(file.read_text()) if "image" in question]
    return [json.loads(line)["question_id"] for line in file.read_text().splitlines()]


MODES = {BASELINE: {"slow"}, DUALSPEED: {"fast", "slow"}, NAIVE: {"fast"}}
"""Row -> modes of its steps."""


@pytest.mark.parametrize("row", ROWS)
def test_losses_are_finite_and_of_the_modes_of_the_row(finished, row):
    folder = finished[0] / f"results/models/{row}"
    logged = [json.loads(line)["metrics"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [(name, value) for metrics in logged for name, value in metrics.items() if "loss" in name]
    assert losses and all(math.isfinite(value) for _, value in losses)
    assert {name.partition("/")[0] for name, _ in losses if "/ce_loss" in name} == MODES[row]
    distilled = [value for name, value in losses if name == "slow/distillation_loss"]
    assert any(distilled) == (row == DUALSPEED)
    assert (folder / "mode_isolator.safetensors").exists() == (row == DUALSPEED)
    record = json.loads((folder / "training.json").read_text())
    assert (record["stage"], record["num_steps"]) == ("finetune", NUM_STEPS)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("row", ROWS)
def test_each_model_is_trained_from_the_downloaded_checkpoint_as_its_recipe_says(finished, row):
    project = finished[0]
    model = QWEN if row.startswith(QWEN) else SMOLVLM
    source, trained = project / f"data/models/{model}", project / f"results/models/{row}"
    assert json.loads((trained / "config.json").read_text())["architectures"] == [single_gpu.CLASSES[model]]
    before, after = weights_of(source), weights_of(trained)
    assert before.keys() == after.keys()
    changed = {name for name in before if not before[name].equal(after[name].to(before[name].dtype))}
    projector = {name for name in before if ".merger." in name or ".connector." in name}
    tower = {name for name in before if "visual." in name or "vision_model." in name} - projector
    assert tower and projector and not changed & tower and changed & projector
    if model == QWEN:
        adapter = json.loads((trained / "adapter/adapter_config.json").read_text())
        assert (adapter["r"], adapter["lora_alpha"]) == (64, 128)
        assert {layer_of(name) for name in changed - projector} == adapted(trained / "adapter")
    else:
        assert not (trained / "adapter").exists()
        assert any("embed_tokens" in name for name in changed) and any("lm_head" in name for name in changed)


def adapted(folder: Path) -> set[str]:
    """Modules of the language model that an adapter's weights are of."""
    names = load_file(folder / "adapter_model.safetensors")
    return {layer_of(name.rpartition(".lora_")[0]) for name in names}


def layer_of(name: str) -> str:
    """Name of a module of the language model, or of its weight, from its layers on."""
    return "layers." + name.removesuffix(".weight").partition("layers.")[2]


def test_tables_and_report_show_the_rows(finished):
    project = finished[0]
    with (project / "results/tables/single-gpu/table1.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["model"], line["method"]) for line in lines] == [
        (QWEN, "baseline"),
        (QWEN, "dualspeed"),
        (SMOLVLM, "naive_prune"),
    ]
    assert all(math.isfinite(float(line[name])) for line in lines for name in QUESTIONS)
    table = (project / "results/tables/single-gpu/table_speed.md").read_text().splitlines()
    header, rows = table[2].split("|"), [line.split("|") for line in table[4:7]]
    place = next(index for index, name in enumerate(header) if "Pretrain" in name)
    assert [row[place].strip() for row in rows] == ["-"] * 3
    page = (project / "results/report-single-gpu.html").read_text()
    assert all(row in page for row in ROWS)


def test_the_plan_counts_what_was_prepared(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished[0])
    assert main(["plan", "--config", "config/single-gpu"]) == 0
    text = capsys.readouterr().out
    assert "Lengths are counted." in text and f"| {3 * NUM_ROWS + LIMIT} |" in re.sub(" +", " ", text)


def test_nothing_is_left_to_do_until_a_limit_changes(finished, tmp_path):
    project = finished[0]
    assert plan(project, *OWN) == set()
    file = project / "config/single-gpu/config.yaml"
    before = file.read_text()
    edit_config(lambda content: recipe(content, SMOLVLM)["data"][0].update(limit=2), name="single-gpu")(project)
    jobs = plan(project, *OWN)
    file.write_text(before)
    assert {job.split(f" {SMOLVLM}")[0] for job in jobs if SMOLVLM in job} == {
        "Check and prepare the finetune data of",
        "Finetune",
        "Answer the benchmarks with",
        "Score",
        "Time the steps of",
    }
    assert not any(QWEN in job for job in jobs)


def recipe(content: dict, model: str) -> dict:
    return content["models"][model]["stages"]["finetune"]
