"""A real run of the workflow, shrunk: a changed cell trains what a fresh run with that cell would have trained."""

import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from test_workflow import MILD, REPOSITORY, edit_cell, edit_rows, plan, snakemake

TARGETS = [f"results/models/{MILD}", f"results/scores/{MILD}/full/gqa.json"]


def shrunk_project(folder: Path) -> Path:
    """The demo's workflow with one row, few pictures and few steps."""
    for name in ("config", "workflow", "profiles"):
        shutil.copytree(REPOSITORY / name, folder / name)
    shutil.copy(REPOSITORY / "Snakefile", folder)
    file = folder / "config/demo/config.yaml"
    config = yaml.safe_load(file.read_text())
    config["data"] |= {"num_train_scenes": 120, "num_eval_scenes": 10, "questions_per_benchmark": 24}
    config["base_model"] |= {"vision_steps": 3, "caption_steps": 3, "question_steps": 3, "num_scenes": 60}
    for stage in config["models"]["tiny"]["stages"].values():
        stage["training_arguments"] |= {"max_steps": 4, "warmup_steps": 1, "logging_steps": 1}
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    edit_rows(lambda rows: [rows.pop(row) for row in list(rows) if row != MILD])(folder)
    return folder


@pytest.mark.slow
def test_changed_cell_trains_as_a_fresh_run_would(tmp_path):
    edited, fresh = shrunk_project(tmp_path / "edited"), shrunk_project(tmp_path / "fresh")
    snakemake(edited, *TARGETS)
    before = load_file(edited / TARGETS[0] / "model.safetensors")
    edit_cell("pruning_ratio", 0.5)(edited)
    edit_cell("pruning_ratio", 0.5)(fresh)
    for project in (edited, fresh):
        output = snakemake(project, *TARGETS)
        assert all((project / target).exists() for target in TARGETS), output[-3000:]
        assert plan(project, *TARGETS) == set()

    weights = [load_file(project / TARGETS[0] / "model.safetensors") for project in (edited, fresh)]
    isolators = [load_file(project / TARGETS[0] / "mode_isolator.safetensors") for project in (edited, fresh)]
    for one, other in (weights, isolators):
        assert all(one[name].equal(other[name]) for name in other)
    assert any(not before[name].equal(weights[0][name]) for name in before)
    assert (edited / TARGETS[1]).read_text() == (fresh / TARGETS[1]).read_text()
