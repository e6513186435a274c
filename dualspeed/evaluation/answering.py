"""Generation of answers: a trained model answers benchmarks, and a killed job resumes where it stopped.

Answers are appended to a state folder batch by batch; the output file is written after the last one. The folder's name
is a key of everything that decides the answers, so that other settings or weights start from nothing. torch is imported
and the model loaded only if a question is left to answer.
"""

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from dualspeed.benchmarks import Question, QuestionSet, get_question_set
from dualspeed.benchmarks.records import PROMPT_VERSION
from dualspeed.errors import BenchmarkError, CheckpointError, ConfigError
from dualspeed.evaluation.answers import PartialAnswers, write_answers
from dualspeed.evaluation.images import check_images, images_checksum
from dualspeed.files import sha256_of_file, sha256_of_json, write_json
from dualspeed.fingerprints import checkpoint_fingerprint
from dualspeed.layout import METHOD_FILE
from dualspeed.settings.identity import identity, key_of, record
from dualspeed.settings.jobs import AnswerSettings
from dualspeed.tracking.delivery import ParentRun
from dualspeed.tracking.metric_log import MetricLog, RunSpec
from dualspeed.tracking.store import Store

if TYPE_CHECKING:
    from dualspeed.evaluation.generator import AnswerGenerator

KEY_DIGITS = 16


@dataclass(frozen=True)
class Task:
    """One benchmark with its answers so far."""

    benchmark: QuestionSet
    """The benchmark."""
    questions: list[Question]
    """All its questions in official order."""
    part: list[Question]
    """Questions that this process answers: all, or those of its shard."""
    answers: PartialAnswers
    """Answers so far, by this process and earlier ones."""

    @property
    def remaining(self) -> list[Question]:
        """Questions of `part` without an answer."""
        return [question for question in self.part if question.question_id not in self.answers.texts]


def generate_answers(
    settings: AnswerSettings,
    model: str | Path,
    state: str | Path,
    out: str | Path,
    tracking: Store | None = None,
    parent: ParentRun | None = None,
    shard: tuple[int, int] | None = None,
) -> None:
    """Answer every benchmark and write `out`/<benchmark>.jsonl and <benchmark>.throughput.json.

    Args:
        settings: benchmarks and way of inference.
        model: checkpoint folder, with its processor.
        state: folder for partial answers; kept after the last one, so that a new benchmark reuses the others' answers.
        tracking: MLflow store for the throughput; None: not logged.
        parent: MLflow run of the row that the model belongs to.
        shard: (1, 2): answer the first of two parts and leave the answers in `state`. A run without a shard answers
            the remaining questions, none if every shard has run, and writes all answers in the questions' order.

    Raises:
        ConfigError, BenchmarkError: a setting or a file is wrong; before the model is loaded.
    """
    checkpoint = checkpoint_checksum(Path(model))
    tasks = [make_task(settings, name, checkpoint, Path(state), shard) for name in settings.benchmarks]
    image_sizes = check_images([question for task in tasks for question in task.remaining])
    generator = None
    for task in tasks:
        if task.remaining:
            generator = generator or load_generator(settings, Path(model))
            answer_remaining(task, generator, image_sizes, settings.batch_size)
        if shard:
            continue
        file = Path(out) / f"{task.benchmark.name}.jsonl"
        write_json(file.with_suffix(".throughput.json"), throughput(task, settings))
        write_answers(file, task.benchmark, task.questions, task.answers.texts, settings.experiment)
    if tracking and not shard:
        folder = Path(state) / key_of([settings, checkpoint], KEY_DIGITS)
        log_throughput(tasks, settings, folder, tracking, parent)


def make_task(
    settings: AnswerSettings, name: str, checkpoint: str, state_root: Path, shard: tuple[int, int] | None
) -> Task:
    """Load a benchmark's questions and the answers that earlier runs left for exactly these settings."""
    benchmark, folder = get_question_set(name), Path(settings.benchmarks[name].folder)
    questions = benchmark.load_questions(folder)
    if not questions:
        raise BenchmarkError(f"{benchmark.question_file(folder)}: there is no question to answer")
    deciding = identity(settings) | {
        "benchmarks": name,
        "checkpoint": checkpoint,
        "questions": sha256_of_file(benchmark.question_file(folder)),
        "images": images_checksum(name, questions),
        "prompt_version": PROMPT_VERSION,
    }
    state = state_root / key_of(deciding, KEY_DIGITS)
    write_json(state / "settings.json", deciding)
    if shard is None:
        return Task(benchmark, questions, questions, PartialAnswers.open(state / "answers.jsonl"))
    number, total = shard
    part = questions[len(questions) * (number - 1) // total : len(questions) * number // total]
    return Task(benchmark, questions, part, PartialAnswers.open(state / f"answers-{number}of{total}.jsonl"))


def checkpoint_checksum(model_folder: Path) -> str:
    """Digest of all that decides a checkpoint's answers: its own files, and the CLIP of its relevance if it has one."""
    try:
        found = [checkpoint_fingerprint(model_folder)]
    except CheckpointError as error:
        raise ConfigError(f"{error}; expected a checkpoint folder") from None
    method = model_folder / METHOD_FILE
    clip = json.loads(method.read_text(encoding="utf-8")).get("relevance_clip") if method.exists() else None
    if clip is not None and Path(clip).is_dir():
        found.append(checkpoint_fingerprint(Path(clip)))
    return sha256_of_json(found)


def load_generator(settings: AnswerSettings, model_folder: Path) -> "AnswerGenerator":
    """Load the model; torch is imported only here."""
    import torch

    from dualspeed.evaluation.generator import AnswerGenerator

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    pruner, ratio = (settings.pruner, settings.pruning_ratio) if settings.inference == "pruned" else (None, None)
    return AnswerGenerator(model_folder, settings.max_new_tokens, pruner, ratio)


def answer_remaining(
    task: Task, generator: "AnswerGenerator", image_sizes: Mapping[Path, tuple[int, int]], batch_size: int
) -> None:
    """Answer the remaining questions of a task; each batch is on disk before the next one starts."""
    num_done, total = len(task.answers.texts), len(task.questions)
    # Seconds between updates: a log file gets a line for each of them.
    interval = 0.1 if sys.stderr.isatty() else 10
    name = task.benchmark.name
    with tqdm(total=total, initial=num_done, desc=name, unit=" questions", mininterval=interval) as progress:
        for batch in generator.make_batches(task.remaining, image_sizes, batch_size):
            start = time.perf_counter()
            texts, num_new_tokens = generator.answer(batch)
            answers = {question.question_id: text for question, text in zip(batch, texts, strict=True)}
            task.answers.append(answers, time.perf_counter() - start, num_new_tokens)
            progress.update(len(batch))


def throughput(task: Task, settings: AnswerSettings) -> dict[str, Any]:
    """Questions and new tokens per second of one process, with loading of images, without loading of the model."""
    seconds = task.answers.seconds
    return {
        "num_questions": len(task.questions),
        "num_new_tokens": task.answers.num_new_tokens,
        "seconds": seconds,
        "questions_per_second": len(task.questions) / seconds,
        "new_tokens_per_second": task.answers.num_new_tokens / seconds,
        "batch_size": settings.batch_size,
        "threads": settings.threads,
    }


def log_throughput(
    tasks: list[Task], settings: AnswerSettings, folder: Path, tracking: Store, parent: ParentRun | None
) -> None:
    """Log <benchmark>_questions_per_second and <benchmark>_new_tokens_per_second as an MLflow run of its own.

    `folder` is the run's state folder, which keeps metrics that MLflow could not take yet.
    """
    rates = ("questions_per_second", "new_tokens_per_second")
    metrics = {f"{task.benchmark.name}_{rate}": throughput(task, settings)[rate] for task in tasks for rate in rates}
    run = RunSpec(f"{settings.experiment}/{settings.inference}", parent, record(settings))
    with MetricLog(folder, tracking, run) as log:
        log.log(0, metrics)
