"""Has the demo's Baseline levelled off? Trains it half as long again and compares on held-out training scenes.

    python -m measurements.demo_recipe [--config config/demo/config.yaml] [--seeds 0 1 2]

Takes what `make demo-full` made, trains each Baseline's finetuning again with 1.5 times the steps, and answers the
held-out split with both models. What it trains is kept under results/recipe in folders named by what decides their
content, so a second run only prints. The test questions are never looked at.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import yaml

from dualspeed.evaluation.evaluate import generate_answers, score
from dualspeed.files import sha256_of_json
from dualspeed.settings.jobs import answer_settings
from dualspeed.settings.project import Experiment, ProjectConfig, load_project
from dualspeed.settings.stage import StageSettings, finetune_settings, pretrain_key
from dualspeed.training.stage import fingerprint, train

LONGER = 1.5
LARGEST_GAIN = 1.5
"""Points on 0-100 that a levelled-off Baseline gains at most."""
FULL_SHEET = "config/demo/experiments-full.tsv"


def main() -> int:
    """Print a line a seed and their mean; exit status 1 if the mean gain is too large."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="config/demo/config.yaml")
    parser.add_argument("--sheet", default=FULL_SHEET, help="sheet whose Baseline rows are taken")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds to look at; default: all of the sheet")
    options = parser.parse_args()
    project = load_project_with_sheet(options.config, options.sheet)
    rows = [row for row in project.experiments if row.method == "baseline"]
    if options.seeds is not None:
        rows = [row for row in rows if row.seed in options.seeds]
    if not rows:
        parser.error(f"{options.sheet}: no Baseline row with seed {options.seeds}")
    gains = []
    for row in rows:
        usual = held_out_score(project, row, Path(project.results) / "models" / row.id)
        longer = held_out_score(project, row, longer_model(project, row))
        gains.append(longer - usual)
        print(f"{row.id}: {usual:.1f}, trained half as long again {longer:.1f}, gain {longer - usual:+.1f}", flush=True)
    mean = sum(gains) / len(gains)
    print(f"mean gain {mean:+.2f} points (levelled off: less than {LARGEST_GAIN})")
    return int(mean >= LARGEST_GAIN)


def load_project_with_sheet(config: str, sheet: str) -> ProjectConfig:
    """The configuration with another sheet than its own."""
    values = yaml.safe_load(Path(config).read_text())
    return load_project(values | {"experiments": sheet}, config)


def lengthened(settings: StageSettings) -> StageSettings:
    """The same stage with half as many steps again; the schedule stretches along."""
    arguments = settings.recipe.training_arguments
    longer = arguments | {"max_steps": round(LONGER * arguments["max_steps"])}
    return dataclasses.replace(settings, recipe=dataclasses.replace(settings.recipe, training_arguments=longer))


def longer_model(project: ProjectConfig, row: Experiment) -> Path:
    """Folder of a row's model, trained half as long again (unless that was done before)."""
    results, settings = Path(project.results), lengthened(finetune_settings(project, row))
    start, data = results / "pretrain" / pretrain_key(project, row), results / "prepared" / row.model / "finetune"
    identity = [settings.to_dict(), fingerprint(start, "*.safetensors"), fingerprint(data, "*.arrow")]
    model = results / "recipe" / f"{row.id}-longer-{sha256_of_json(identity)[:8]}"
    if not model.is_dir():
        train(settings, start, data, results / "state", model)
    return model


def held_out_score(project: ProjectConfig, row: Experiment, model: Path) -> float:
    """Answer and score the held-out split with a model; mean of the benchmarks on 0-100."""
    if not model.is_dir():
        sys.exit(f"{model} is missing; run `make demo-full` first (or `make demo`, for seed 0 alone)")
    settings = answer_settings(project, row, "full")
    for benchmark in settings["benchmarks"].values():
        benchmark["folder"] = str(held_out(Path(benchmark["folder"])))
    out = Path(project.results) / "recipe" / "answers" / model.name
    generate_answers(settings, model, Path(project.results) / "state", out)
    scores = [
        score(name, held_out(Path(benchmark.folder)), out / f"{name}.jsonl", out / f"{name}.json")
        for name, benchmark in project.benchmarks.items()
    ]
    return sum(result["percent"] for result in scores) / len(scores)


def held_out(folder: Path) -> Path:
    """Folder of a benchmark's held-out split, beside its test split."""
    return folder.parent.parent / "heldout" / folder.name


if __name__ == "__main__":
    sys.exit(main())
