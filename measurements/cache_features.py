"""Time that kept features of the frozen tower save in the demo's finetunings, and whether the scores stay the same.

    python -m measurements.cache_features [--rows ID ...] [--steps N] [--out FOLDER]

Needs the results of `make demo`. Finetunes the rows of its sheet one after another, each without and with
`cache_features`, all with one new cache, and answers the benchmarks with both models. `--steps` shortens the trainings.
Prints a line a row: seconds of the finetuning without and with the cache, and the scores. The first row encodes all
images; the lines behind the table say how long that took, and what the disk holds. Exit status 1 if a score differs.
"""

import argparse
import dataclasses
import json
import shutil
import sys
import time
from pathlib import Path

import pandas as pd

from dualspeed.evaluation.answering import generate_answers
from dualspeed.evaluation.scoring import score
from dualspeed.layout import TRAINING_RECORD, Layout
from dualspeed.settings.jobs import answer_settings
from dualspeed.settings.project import Project, load_project
from dualspeed.settings.sheet import Row
from dualspeed.training.stage import train
from dualspeed.training.stored_features import FeatureStore


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="config/demo/config.yaml")
    parser.add_argument("--rows", nargs="+", help="ids of rows; default: all of the sheet")
    parser.add_argument("--steps", type=int, help="steps of a finetuning; default: the recipe's")
    parser.add_argument("--out", type=Path, default=Path("results/cache_features"), help="folder, which is emptied")
    options = parser.parse_args()
    project = load_project(options.config)
    rows = [row for row in project.rows if options.rows is None or row.id in options.rows]
    shutil.rmtree(options.out, ignore_errors=True)
    encoding = timed_encoding()
    lines, num_different = [], 0
    for row in rows:
        plain, cached = (trained(project, row, options.steps, options.out, kind) for kind in ("plain", "cached"))
        scores = [scores_of(project, row, model) for model in (plain, cached)]
        seconds = [seconds_of(model) for model in (plain, cached)]
        is_equal = scores[0] == scores[1]
        num_different += not is_equal
        lines.append(
            {
                "row": row.id,
                "s without": round(seconds[0], 1),
                "s with": round(seconds[1], 1),
                "saved": f"{1 - seconds[1] / seconds[0]:.0%}",
                "score without": sum(scores[0].values()) / len(scores[0]),
                "score with": sum(scores[1].values()) / len(scores[1]),
                "equal": "yes" if is_equal else "no",
            }
        )
        print(lines[-1], file=sys.stderr, flush=True)
    print(pd.DataFrame(lines).to_markdown(index=False))
    files = list((options.out / "cache").glob("*/??/*"))
    size = sum(file.stat().st_size for file in files)
    print(f"encoding: {sum(encoding):.1f} s; on the disk: {len(files)} images, {size / 1e6:.0f} MB")
    total = pd.DataFrame(lines)[["s without", "s with"]].sum().tolist()
    print(f"all rows: {total[0]:.1f} s without, {total[1]:.1f} s with; {num_different} of {len(lines)} scores differ")
    return int(num_different > 0)


def timed_encoding() -> list[float]:
    """Seconds of each look for images, and encoding of those that are missing, as the trainings go on."""
    seconds: list[float] = []
    fill = FeatureStore.fill

    def timed(store: FeatureStore, dataset: object) -> None:
        started = time.perf_counter()
        fill(store, dataset)
        seconds.append(time.perf_counter() - started)

    FeatureStore.fill = timed  # type: ignore[assignment, method-assign]
    return seconds


def trained(project: Project, row: Row, steps: int | None, out: Path, kind: str) -> Path:
    """Folder of a row's model, finetuned without or with the cache."""
    settings, layout = project.finetune_settings(row), Layout(project.results)
    if steps is not None:
        arguments = settings.recipe.training_arguments | {"max_steps": steps}
        recipe = dataclasses.replace(settings.recipe, training_arguments=arguments)
        settings = dataclasses.replace(settings, recipe=recipe)
    model = out / f"{row.id}-{kind}"
    train(
        settings,
        Path(layout.pretraining(row.pretrain_key or "")),
        Path(layout.prepared(row.model, "finetune")),
        out / f"state-{kind}",
        model,
        cache_features=str(out / "cache") if kind == "cached" else None,
    )
    return model


def seconds_of(model: Path) -> float:
    """Seconds of the training that made a model, without validations."""
    return json.loads((model / TRAINING_RECORD).read_text(encoding="utf-8"))["train_seconds"]


def scores_of(project: Project, row: Row, model: Path) -> dict[str, float]:
    """Score of a model on each benchmark, 0 to 100."""
    answers = model.with_name(f"{model.name}-answers")
    generate_answers(answer_settings(project, row, "full"), model, answers / "state", answers)
    return {
        name: score(name, benchmark.folder, answers / f"{name}.jsonl", answers / f"{name}.json")["percent"]
        for name, benchmark in project.benchmarks.items()
    }


if __name__ == "__main__":
    sys.exit(main())
