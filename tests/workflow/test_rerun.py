"""A real run of the workflow, shrunk: a changed cell trains what a fresh run with that cell would have trained."""

import pytest
from safetensors.torch import load_file

from tests.support.workflow import TARGETS, edit_cell, plan, shrunk_project, snakemake


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
