"""Study of slow steps: quality of the demo's model over the number, share and placement of its slow steps.

    python -m measurements.slow_steps [--jobs 2] [--results results] [--only ROLE]

Needs the results of `make demo`. Each row of slow_steps.tsv is one finetuning by the demo's recipe, answered on full
tokens by held-out scenes (the four benchmarks' held-out splits, 2,000 questions), never by the test questions. A row
that has a result is not run again, so that a killed study goes on. At the end, slow_steps_fit.py writes the tidy file,
the fit and the figures.
"""

import argparse
import csv
import dataclasses
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest.mock import patch

from dualspeed.errors import ConfigError
from dualspeed.files import write_json
from dualspeed.layout import Layout
from dualspeed.method import model as method_model
from dualspeed.settings.fields import check_fields, choice, number
from dualspeed.settings.method import DualSpeedConfig
from dualspeed.settings.modes import Mode
from dualspeed.settings.project import BenchmarkConfig, Project, load_project
from dualspeed.settings.stage import StageSettings, finetune_settings, pretrain_key, pretrain_settings
from measurements.demo_recipe import held_out

SHEET = Path(__file__).with_suffix(".tsv")
CONFIG = "config/demo/config.yaml"
PLACEMENTS = ("even", "rising", "rate")
ROLES = ("fit", "test", "variant", "baseline")
LARGEST_NUMBER_OF_RUNS = 60


@dataclass(frozen=True, kw_only=True)
class StudyRow:
    """One finetuning of the study."""

    id: str
    steps: int = number(minimum=1)
    """Optimizer steps T."""
    slow_steps: int = number(minimum=1)
    """Slow steps N among them; N = T is a Baseline."""
    pruning_ratio: float = number(minimum=0, below=1)
    """Share p of visual tokens that fast steps drop."""
    placement: str = choice(PLACEMENTS)
    """Density of slow steps: the same everywhere, proportional to the step, or to its learning rate."""
    window_start: float = number(minimum=0, below=1)
    """Share of the training before the first slow step may come."""
    window_end: float = number(above=0, maximum=1)
    """Share of the training after which none comes."""
    num_virtual_tokens: int = number(minimum=0)
    """Length of the mode isolator."""
    distillation_weight: float = number(minimum=0)
    """Weight of the teacher."""
    positions: str = choice(("packed", "original"))
    """Position ids of the tokens that fast steps keep: counted anew, or those of the full sequence."""
    seed: int
    role: str = choice(ROLES)
    """fit: the fit is made of it; test: the fit is tested on it; variant: another method; baseline: for the figure."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.window_start >= self.window_end:
            raise ConfigError(
                f"window_start: {self.window_start} of a window that ends at {self.window_end}; valid: below"
            )
        if self.slow_steps < self.steps and sum(slow_steps_of(self, warmup=0)) != self.slow_steps:
            raise ConfigError(
                f"slow_steps: {self.slow_steps} don't fit into their window; valid: fewer, or a wider one"
            )

    @property
    def is_baseline(self) -> bool:
        """True if every step is slow."""
        return self.slow_steps == self.steps


def read_study(path: Path) -> list[StudyRow]:
    """Rows of the study's sheet; ConfigError names the row that is wrong."""
    types = {field.name: field.type for field in dataclasses.fields(StudyRow)}
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file, delimiter="\t"))
    rows = []
    for line in lines:
        try:
            rows.append(StudyRow(**{name: types[name](value) for name, value in line.items()}))
        except (ConfigError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: row {line.get('id')}: {error}") from None
    if len(rows) > LARGEST_NUMBER_OF_RUNS:
        raise ConfigError(f"{path}: {len(rows)} rows; valid: at most {LARGEST_NUMBER_OF_RUNS}")
    return rows


def slow_steps_of(row: StudyRow, warmup: int) -> list[bool]:
    """Slow or not, for each step: slow steps have the row's density in its window, and their number is exact.

    Args:
        warmup: steps in which the learning rate rises; then it falls by a cosine.
    """
    first, last = round(row.window_start * row.steps), round(row.window_end * row.steps)
    density = {
        "even": lambda step: 1.0,
        "rising": lambda step: step + 1.0,
        "rate": lambda step: learning_rate(step, row.steps, warmup),
    }[row.placement]
    weights = [density(step) if first <= step < last else 0.0 for step in range(row.steps)]
    total = sum(weights)
    shares = [0.0, *(row.slow_steps * part / total for part in accumulate(weights))]
    shares[last:] = [float(row.slow_steps)] * (len(shares) - last)  # no rounding at the end
    offset = random.Random(f"{row.seed}").random()
    return [math.floor(shares[step + 1] + offset) > math.floor(shares[step] + offset) for step in range(row.steps)]


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """Share of the highest learning rate: linear warm-up, then a cosine."""
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def settings_of(project: Project, row: StudyRow) -> tuple[StageSettings, StageSettings]:
    """Settings of a row's pretraining and finetuning, without validations."""
    (name,) = project.models
    model = project.models[name]
    stages = {
        stage: dataclasses.replace(getattr(model.stages, stage), validation_annotations=None, validation_steps=None)
        for stage in ("pretrain", "finetune")
    }
    model = dataclasses.replace(model, stages=dataclasses.replace(model.stages, **stages))
    method = DualSpeedConfig(
        pruning_ratio=row.pruning_ratio,
        slow_mode_ratio=1.0 if row.is_baseline else row.slow_steps / row.steps,
        num_virtual_tokens=0 if row.is_baseline else row.num_virtual_tokens,
        distillation_weight=0.0 if row.is_baseline else row.distillation_weight,
        prune_budget=model.prune_budget,
    )
    pretrain = pretrain_settings(model, method, row.seed)
    assert pretrain is not None  # the demo has one
    return pretrain, finetune_settings(model, method, row.seed, row.steps)


def run_row(row: StudyRow, results: Path, out: Path) -> None:
    """Train and answer one row; write its result, with the settings that made it, to <out>/<id>.json."""
    import torch

    from dualspeed.training.stage import train

    torch.set_num_threads(1)
    project = dataclasses.replace(load_project(CONFIG), results=str(results))
    layout, (name,) = Layout(str(results)), project.models
    pretrain, finetune = settings_of(project, row)
    start = out / "pretrained" / pretrain_key(name, pretrain)
    if not start.is_dir():
        prepared = Path(layout.prepared(name, "pretrain"))
        train(pretrain, Path(layout.base_model(name)), prepared, out / "state", start)
    slow, seconds, model = train_row(row, finetune, start, Path(layout.prepared(name, "finetune")), out)
    scores = answer(project, row, model, results, out)
    result = {"settings": dataclasses.asdict(row), "num_slow_steps": slow, "train_seconds": seconds, "scores": scores}
    write_json(out / f"{row.id}.json", result | {"score": sum(scores.values()) / len(scores)})


def train_row(row: StudyRow, settings: StageSettings, start: Path, data: Path, out: Path) -> tuple[int, float, Path]:
    """Number of slow steps, seconds, and folder of the model of a row's finetuning."""
    import time

    from dualspeed.training.stage import load_data, load_model, make_trainer

    model, processor = load_model(settings, start)
    dataset, _ = load_data(settings, data)
    folder = out / "models" / row.id
    trainer: Any = make_trainer(settings, model, processor, dataset, None, folder / "checkpoints", time.monotonic())
    warmup = settings.recipe.training_arguments["warmup_steps"]
    modes = [Mode.SLOW if row.is_baseline or slow else Mode.FAST for slow in slow_steps_of(row, warmup)]
    trainer.mode_of_step = modes.__getitem__
    trainer.args.save_strategy = "no"
    with original_positions() if row.positions == "original" else nullcontext():
        trainer.train()
    trainer.save_model(str(folder))
    processor.save_pretrained(folder)
    return sum(mode is Mode.SLOW for mode in modes), trainer.seconds(), folder


def original_positions() -> AbstractContextManager:
    """While it is open, tokens that fast steps keep have the position ids of the full sequence."""
    compute = method_model.token_inputs

    def with_positions(vlm: Any, input_ids: Any, attention_mask: Any, *others: Any) -> dict[str, Any]:
        positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        return compute(vlm, input_ids, attention_mask, *others) | {"position_ids": positions}

    return patch.object(method_model, "token_inputs", with_positions)


def answer(project: Project, row: StudyRow, model: Path, results: Path, out: Path) -> dict[str, float]:
    """Benchmark -> percentage of a model on full tokens and held-out scenes."""
    from dualspeed.evaluation.answering import generate_answers
    from dualspeed.evaluation.scoring import score
    from dualspeed.settings.jobs import answer_settings

    def moved(folder: str) -> Path:
        return held_out(results / Path(folder).relative_to(load_project(CONFIG).results))

    folders = {name: moved(benchmark.folder) for name, benchmark in project.benchmarks.items()}
    benchmarks = {name: BenchmarkConfig(folder=str(folder)) for name, folder in folders.items()}
    settings = dataclasses.replace(
        answer_settings(project, project.rows[0], "full"), experiment=row.id, benchmarks=benchmarks
    )
    answers = out / "answers" / row.id
    generate_answers(settings, model, out / "state", answers)
    return {
        name: score(name, folder, answers / f"{name}.jsonl", answers / f"{name}.json")["percent"]
        for name, folder in folders.items()
    }


def results_of(rows: Sequence[StudyRow], out: Path) -> Iterator[tuple[StudyRow, dict[str, Any] | None]]:
    """Each row with its result; None for a row that has none, or that of other settings."""
    for row in rows:
        path = out / f"{row.id}.json"
        result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        yield row, result if result and result["settings"] == dataclasses.asdict(row) else None


def step_seconds(results: Path) -> dict[str, float]:
    """Median seconds of a fast, a slow and a Baseline's step at p = 0.9, as `make demo` measured them."""
    project = dataclasses.replace(load_project(CONFIG), results=str(results))
    row = next(row for row in project.rows if row.method == "dualspeed" and row.dualspeed == DualSpeedConfig())
    times = json.loads(Path(Layout(str(results)).speed(str(row.speed_key))).read_text(encoding="utf-8"))
    return {name: times[f"{name}_step_seconds"] for name in ("fast", "slow", "baseline")}


def run_all(rows: Sequence[StudyRow], out: Path, results: Path, jobs: int) -> None:
    """Run each row in a process of its own, `jobs` at once; one line for each that ends."""

    def run(row: StudyRow) -> None:
        command = [sys.executable, "-m", "measurements.slow_steps", "--results", str(results), "--run", row.id]
        log = out / "logs" / f"{row.id}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            done = subprocess.run(command, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"})
        path = out / f"{row.id}.json"
        said = f"{json.loads(path.read_text())['score']:.1f}" if done.returncode == 0 else f"failed, see {log}"
        print(f"{row.id}: {said}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, rows))


def main() -> int:
    """Run what has no result, then write file, fit and figures; exit status 1 if a row failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=2, help="trainings at once, each with one thread")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of `make demo`")
    parser.add_argument("--only", choices=ROLES, help="rows of one role")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    out, rows = options.results / "slow_steps", read_study(SHEET)
    if options.run:
        run_row(next(row for row in rows if row.id == options.run), options.results, out)
        return 0
    wanted = [row for row in rows if options.only in (None, row.role)]
    run_all([row for row, result in results_of(wanted, out) if result is None], out, options.results, options.jobs)

    from measurements.slow_steps_fit import report

    report(list(results_of(rows, out)), step_seconds(options.results), out)
    return int(any(result is None for _, result in results_of(wanted, out)))


if __name__ == "__main__":
    sys.exit(main())
