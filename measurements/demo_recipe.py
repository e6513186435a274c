"""Test that the demo's Baseline has levelled off: scores on held-out training scenes after 1.5 times the steps.

    python -m measurements.demo_recipe [--config config/demo/config.yaml] [--seeds 0 1 2]

Needs the results of `make demo-full`. Repeats each Baseline's finetuning with 1.5 times the steps, and answers the
held-out split with both models, never the test questions. The trained models stay under results/recipe, in folders
named by a hash of settings and inputs, so that a second run only prints.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from dualspeed.evaluation.answering import generate_answers
from dualspeed.evaluation.scoring import score
from dualspeed.files import sha256_of_json
from dualspeed.fingerprints import checkpoint_fingerprint, dataset_fingerprint
from dualspeed.layout import Layout
from dualspeed.settings.identity import key_of
from dualspeed.settings.jobs import answer_settings
from dualspeed.settings.project import BenchmarkConfig, Project, load_project
from dualspeed.settings.sheet import Row
from dualspeed.settings.stage import StageSettings
from dualspeed.training.stage import train

LONGER = 1.5
LARGEST_GAIN = 1.5
"""Points on 0-100 that a levelled-off Baseline gains at most."""
FULL_SHEET = "config/demo/experiments-full.tsv"


def main() -> int:
    """Print one line a seed and the mean gain; exit status 1 if it is too large."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="config/demo/config.yaml")
    parser.add_argument("--sheet", default=FULL_SHEET, help="sheet whose Baseline rows are taken")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: all seeds of the sheet")
    options = parser.parse_args()
    project = load_project(options.config, experiments=options.sheet)
    rows = [row for row in project.rows if row.method == "baseline"]
    if options.seeds is not None:
        rows = [row for row in rows if row.seed in options.seeds]
    if not rows:
        parser.error(f"{options.sheet}: no Baseline row with seed {options.seeds}")
    gains = []
    for row in rows:
        usual = held_out_score(project, row, Path(Layout(project.results).model(row.id)))
        longer = held_out_score(project, row, longer_model(project, row))
        gains.append(longer - usual)
        print(f"{row.id}: {usual:.1f}, trained half as long again {longer:.1f}, gain {longer - usual:+.1f}", flush=True)
    mean = sum(gains) / len(gains)
    print(f"mean gain {mean:+.2f} points (levelled off: less than {LARGEST_GAIN})")
    return int(mean >= LARGEST_GAIN)


def lengthened(settings: StageSettings) -> StageSettings:
    """Settings of the same stage with 1.5 times the steps; the learning rate schedule becomes longer as well."""
    arguments = settings.recipe.training_arguments
    longer = arguments | {"max_steps": round(LONGER * arguments["max_steps"])}
    return dataclasses.replace(settings, recipe=dataclasses.replace(settings.recipe, training_arguments=longer))


def longer_model(project: Project, row: Row) -> Path:
    """Folder of a row's model with 1.5 times the steps; trains it if the folder is missing."""
    layout, settings = Layout(project.results), lengthened(project.finetune_settings(row))
    start, data = Path(layout.pretraining(row.pretrain_key)), Path(layout.prepared(row.model, "finetune"))
    inputs = [key_of(settings), checkpoint_fingerprint(start), dataset_fingerprint(data)]
    model = recipe_folder(project) / f"{row.id}-longer-{sha256_of_json(inputs)[:8]}"
    if not model.is_dir():
        train(settings, start, data, Path(layout.state), model)
    return model


def held_out_score(project: Project, row: Row, model: Path) -> float:
    """Mean score of a model on the held-out split of the benchmarks, 0 to 100."""
    if not model.is_dir():
        sys.exit(f"{model} is missing; run `make demo-full` first (or `make demo`, for seed 0 alone)")
    folders = {name: held_out(Path(benchmark.folder)) for name, benchmark in project.benchmarks.items()}
    benchmarks = {name: BenchmarkConfig(folder=str(folder)) for name, folder in folders.items()}
    settings = dataclasses.replace(answer_settings(project, row, "full"), benchmarks=benchmarks)
    out = recipe_folder(project) / "answers" / model.name
    generate_answers(settings, model, Path(Layout(project.results).state), out)
    scores = [score(name, folder, out / f"{name}.jsonl", out / f"{name}.json") for name, folder in folders.items()]
    return sum(result["percent"] for result in scores) / len(scores)


def recipe_folder(project: Project) -> Path:
    """Folder of everything that this measurement writes."""
    return Path(project.results) / "recipe"


def held_out(folder: Path) -> Path:
    """Folder of a benchmark's held-out split, beside its test split."""
    return folder.parent.parent / "heldout" / folder.name


if __name__ == "__main__":
    sys.exit(main())
