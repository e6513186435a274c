"""A project whose data are three sources of rows, from their files to tables, and again when a share changes."""

import json
from pathlib import Path

import pytest
import yaml
from datasets import load_from_disk

from tests.support import tiny
from tests.support.official import write_benchmark
from tests.support.rows import write_sources
from tests.support.workflow import copy_project, plan, snakemake

OWN = ("--configfile", "config.yaml")
TABLE, MODEL, PREPARED = "results/tables/own/table1.md", "results/models/own", "results/prepared/tiny/finetune"
ROW = {
    **{"id": "own", "model": "tiny", "method": "dualspeed", "pruner": "divprune", "pruning_ratio": "0.75"},
    **{"slow_mode_ratio": "0.5", "num_virtual_tokens": "", "distillation_weight": "", "seed": "0", "tables": "table1"},
}
DATA = [
    {"path": "data/chat.json", "images": "data/images"},
    {"path": "data/cauldron", "share": 0.5},
    {"path": "data/saved", "split": "train", "limit": 3, "format": "messages"},
]
EVALUATED = {
    "Answer the benchmarks with own, full tokens",
    "Score own, full tokens",
    "Time the steps of tiny-divprune-p0.75-l4-distilled-*, alone on this machine",
    "Write tables and figures of the sheet own",
}


def write_project(folder: Path) -> None:
    """A checkpoint of the user's own, a benchmark, and a recipe for each way to name data."""
    copy_project(folder)
    tiny.make_llava(folder / "model")
    write_benchmark("gqa", folder / "gqa", limit=2)
    write_sources(folder / "data", num_rows=8)
    stage = {
        "chat_template": "turns",
        "max_length": 512,
        "global_batch_size": 4,
        "training_arguments": {"use_cpu": True, "max_steps": 2, "learning_rate": 1e-3, "logging_steps": 1},
    }
    short = {"annotations": "data/chat.json", "images": "data/images"}
    stages = {"pretrain": stage | short, "finetune": stage | {"data": DATA}}
    config = {
        "name": "own",
        "results": "results",
        "experiments": "experiments.tsv",
        "tracking": {"uri": "sqlite:///results/mlflow.db", "experiment": "own"},
        "models": {"tiny": {"source": "model", "stages": stages}},
        "benchmarks": {"gqa": {"folder": "gqa"}},
        "inference": {"batch_size": 4, "max_new_tokens": 2},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "experiments.tsv").write_text("\t".join(ROW) + "\n" + "\t".join(ROW.values()) + "\n")


def change_share(folder: Path, share: float) -> None:
    """Take another share of the second source."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["models"]["tiny"]["stages"]["finetune"]["data"][1]["share"] = share
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def counts(folder: Path) -> list[int]:
    """Samples of each source in the prepared data."""
    manifest = json.loads((folder / PREPARED / "manifest.json").read_text())
    assert manifest["num_dropped"] == 0
    return [source["num_samples"] for source in manifest["sources"]]


@pytest.mark.slow
def test_three_sources_are_trained_to_tables_and_a_changed_share_again(tmp_path):
    write_project(tmp_path)
    output = snakemake(tmp_path, "--cores", "2", TABLE, *OWN)
    assert (tmp_path / TABLE).exists(), output[-3000:]
    assert "DualSpeed" in (tmp_path / TABLE).read_text()
    assert counts(tmp_path) == [8, 4, 3]
    prepared = load_from_disk(tmp_path / PREPARED)
    assert [Path(path).exists() or (tmp_path / path).exists() for path in prepared[8]["images"]] == [True, True]
    assert plan(tmp_path, TABLE, *OWN) == set()

    change_share(tmp_path, 0.75)
    again = {"Check and prepare the finetune data of tiny", "Finetune own"}
    assert plan(tmp_path, TABLE, *OWN) == again | EVALUATED
    output = snakemake(tmp_path, "--cores", "2", MODEL, *OWN)
    assert counts(tmp_path) == [8, 6, 3], output[-3000:]
    recipe = json.loads((tmp_path / MODEL / "training.json").read_text())["settings"]["recipe"]
    assert [source["share"] for source in recipe["data"]] == [None, 0.75, None]
    assert plan(tmp_path, TABLE, *OWN) == EVALUATED
    assert "data[1].path: 'data/lost' does not exist" in with_lost_path(tmp_path)


def with_lost_path(folder: Path) -> str:
    """Output of a dry run whose second source is not there."""
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("data/cauldron", "data/lost"))
    return snakemake(folder, "-n", TABLE, *OWN)
