"""The paper's configuration: what it would run, all of it."""

import re
import shutil
from pathlib import Path

import pytest

from dualspeed.settings.project import load_project
from tests.support.workflow import REPOSITORY, snakemake


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A folder without data or results."""
    folder = tmp_path_factory.mktemp("paper")
    for name in ("Snakefile", "workflow", "profiles", "config"):
        source = REPOSITORY / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    return folder


JOBS = {
    "experiments": {
        "download": 12,
        "assemble_base_model": 3,
        "prepare_data": 6,
        "pretrain": 26,
        "finetune": 32,
        "measure_speed": 24,
        "generate_answers": 47,
        "score": 47,
    },
    "experiments-lora": {
        "download": 12,
        "assemble_base_model": 3,
        "prepare_data": 6,
        "pretrain": 9,
        "finetune": 9,
        "measure_speed": 6,
        "generate_answers": 18,
        "score": 18,
    },
    "experiments-slow-steps": {
        "download": 12,
        "assemble_base_model": 2,
        "link_base_model": 1,
        "prepare_data": 5,
        "pretrain": 4,
        "finetune": 15,
        "measure_speed": 3,
        "generate_answers": 15,
        "score": 15,
    },
}
UNUSED = {
    "experiments": {"qwen3-vl-4b"},
    "experiments-lora": {"qwen3-vl-4b"},
    "experiments-slow-steps": {"vicuna-13b"},
}
"""Downloads that no row of a sheet needs."""


@pytest.mark.parametrize("sheet", JOBS)
def test_a_dry_run_lists_the_jobs_of_the_whole_paper(project, sheet):
    arguments = ["--configfile", "config/paper/config.yaml", "--config", f"experiments=config/paper/{sheet}.tsv"]
    output = snakemake(project, "-n", *arguments)
    found = dict(re.findall(r"^(\w+) +(\d+)$", output, flags=re.MULTILINE))
    assert {name: int(found[name]) for name in JOBS[sheet]} == JOBS[sheet], output[-3000:]
    fetched = set(re.findall(r"^Job \d+: Download (\S+) ", output, flags=re.MULTILINE))
    assert fetched == set(load_project(project / "config/paper/config.yaml").downloads) - UNUSED[sheet]


def test_the_sheet_has_every_row_of_the_papers_tables(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    project = load_project("config/paper/config.yaml")
    rows = {
        table: {one.id.removeprefix(f"{one.model}-") for one in project.rows if table in one.tables}
        for table in ("table1", "table3")
    }
    pruners = ("divprune", "fastervlm", "cdpruner")
    assert rows["table1"] == {"baseline"} | {f"{m}-{p}-p0.9" for m in ("naive_prune", "dualspeed") for p in pruners}
    steps = ("naive_prune-divprune-p0.9", *(f"dualspeed-divprune-p0.9{step}" for step in ("-l0-a0", "-l4-a0", "")))
    assert rows["table3"] == {"baseline", *steps}
    of_figure5 = [one.dualspeed for one in project.rows if "figure5" in one.tables and one.method == "dualspeed"]
    assert {one.pruning_ratio for one in of_figure5} == {0.5, 0.6, 0.7, 0.8, 0.9, 0.95}
    assert {one.slow_mode_ratio for one in of_figure5} == {0, 0.05, 0.1, 0.15, 0.2}
    assert len({one.pretrain_key for one in project.rows}) == JOBS["experiments"]["pretrain"]
    assert project.models["llava-next-7b"].prune_budget == "tile"
