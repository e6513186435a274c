"""Evaluation in two steps that meet in a file: a trained model answers benchmarks, and the answers are scored.

Generating is resumable: answers go to a state folder batch by batch and become the output file when the last one is
there. The folder is named by everything that decides the answers, so other settings or weights start afresh. Neither
torch nor the model is loaded before a question is left to answer, and never for scoring.
"""

import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from dualspeed.benchmarks import Question, QuestionSet, get_benchmark, get_question_set, get_server_benchmark, unit_ids
from dualspeed.benchmarks.records import PROMPT_VERSION, by_category
from dualspeed.errors import BenchmarkError, ConfigError
from dualspeed.evaluation.answers import PartialAnswers, naming_lines, read_answers, write_answers
from dualspeed.evaluation.bootstrap import bootstrap_interval
from dualspeed.evaluation.images import check_images, images_checksum
from dualspeed.files import sha256_of_file, sha256_of_json, write_atomic, write_json
from dualspeed.settings.names import PRUNER_NAMES
from dualspeed.settings.project import BenchmarkConfig
from dualspeed.settings.reading import check_choice, check_range, read_dataclass
from dualspeed.tracking.metric_log import MetricLog, ParentRun, RunSpec

if TYPE_CHECKING:
    from dualspeed.evaluation.generator import Answerer

INFERENCES = ("full", "pruned")
# What decides a checkpoint's answers; training.json beside it differs from run to run.
CHECKPOINT_FILES = ("*.safetensors", "config.json", "generation_config.json", "dualspeed.json")
PROCESSOR_FILES = ("*processor_config.json", "tokenizer*", "special_tokens_map.json", "chat_template.*")


@dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """One model and one way of inference, for all benchmarks."""

    experiment: str
    """The model's name in answers files."""
    inference: str
    """`full` or `pruned` visual tokens."""
    benchmarks: dict[str, BenchmarkConfig]
    """Where the files of each benchmark lie."""
    batch_size: int
    max_new_tokens: int
    pruner: str | None = None
    """Only for pruned inference, as its ratio."""
    pruning_ratio: float | None = None
    threads: int | None = None
    """CPU threads; None: torch's choice."""

    def __post_init__(self) -> None:
        check_choice("inference", self.inference, INFERENCES)
        check_range("batch_size", self.batch_size, self.batch_size > 0, "above 0")
        check_range("max_new_tokens", self.max_new_tokens, self.max_new_tokens > 0, "above 0")
        for name in self.benchmarks:
            get_question_set(name)
        if self.inference == "pruned":
            if self.pruner is None or self.pruning_ratio is None:
                raise ConfigError("inference: pruned needs pruner and pruning_ratio")
            check_choice("pruner", self.pruner, PRUNER_NAMES)
            check_range("pruning_ratio", self.pruning_ratio, 0 <= self.pruning_ratio < 1, "in [0, 1)")


@dataclass
class Task:
    """One benchmark with the answers it has so far."""

    benchmark: QuestionSet
    questions: list[Question]
    part: list[Question]
    """Those of them that this process answers."""
    answers: PartialAnswers

    @property
    def remaining(self) -> list[Question]:
        """Questions of the part without an answer."""
        return [question for question in self.part if question.question_id not in self.answers.texts]


def generate_answers(
    settings: Mapping[str, Any],
    model: str | Path,
    state: str | Path,
    out: str | Path,
    tracking: dict[str, str] | None = None,
    parent: dict[str, str] | None = None,
    shard: tuple[int, int] | None = None,
) -> None:
    """Answer every benchmark and write `out`/<benchmark>.jsonl and <benchmark>.throughput.json.

    Args:
        settings: an AnswerSettings as a mapping.
        model: the checkpoint folder, with its processor.
        state: where partial answers are kept, for as long as someone may want to resume.
        tracking, parent: MLflow store and the row's run there, for the throughput; None: not logged.
        shard: (1, 2): answer the first of two parts and leave the answers in `state`. A run without a shard answers
            what is left, nothing if every shard has run, and writes all of them in the questions' order.

    Raises:
        ConfigError, BenchmarkError: a setting or a file is wrong; before the model is loaded.
    """
    wanted: AnswerSettings = read_dataclass(AnswerSettings, settings, "settings")
    checkpoint = checkpoint_checksum(Path(model))
    tasks = [make_task(wanted, name, checkpoint, Path(state), shard) for name in wanted.benchmarks]
    image_sizes = check_images([question for task in tasks for question in task.remaining])
    answerer = None
    for task in tasks:
        if task.remaining:
            answerer = answerer or load_answerer(wanted, Path(model))
            answer_remaining(task, answerer, image_sizes, wanted.batch_size)
        if shard:
            continue
        file = Path(out) / f"{task.benchmark.name}.jsonl"
        write_json(file.with_suffix(".throughput.json"), throughput(task, wanted))
        write_answers(file, task.benchmark, task.questions, task.answers.texts, wanted.experiment)
    if tracking and not shard:
        folder = Path(state) / sha256_of_json([asdict(wanted), checkpoint])[:16]
        log_throughput(tasks, wanted, folder, tracking, ParentRun(**parent) if parent else None)


def make_task(
    settings: AnswerSettings, name: str, checkpoint: str, state_root: Path, shard: tuple[int, int] | None
) -> Task:
    """Load a benchmark's questions and whatever answers earlier runs left for exactly these settings."""
    benchmark, folder = get_question_set(name), Path(settings.benchmarks[name].folder)
    questions = benchmark.load_questions(folder)
    if not questions:
        raise BenchmarkError(f"{benchmark.question_file(folder)}: there is no question to answer")
    identity = asdict(settings) | {
        "benchmarks": name,
        "checkpoint": checkpoint,
        "questions": sha256_of_file(benchmark.question_file(folder)),
        "images": images_checksum(name, questions),
        "prompt_version": PROMPT_VERSION,
    }
    state = state_root / sha256_of_json(identity)[:16]
    write_json(state / "settings.json", identity)
    if shard is None:
        return Task(benchmark, questions, questions, PartialAnswers.open(state / "answers.jsonl"))
    number, total = shard
    part = questions[len(questions) * (number - 1) // total : len(questions) * number // total]
    return Task(benchmark, questions, part, PartialAnswers.open(state / f"answers-{number}of{total}.jsonl"))


def checkpoint_checksum(model_folder: Path) -> str:
    """Digest of the files of a checkpoint that decide its answers."""
    files = sorted({path for pattern in CHECKPOINT_FILES + PROCESSOR_FILES for path in model_folder.glob(pattern)})
    if not any(path.suffix == ".safetensors" for path in files):
        raise ConfigError(f"{model_folder}: there is no *.safetensors; expected a checkpoint folder")
    return sha256_of_json([(path.name, sha256_of_file(path)) for path in files])


def load_answerer(settings: AnswerSettings, model_folder: Path) -> "Answerer":
    """The model, ready to answer; imports torch only now."""
    import torch

    from dualspeed.evaluation.generator import Answerer

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    pruner, ratio = (settings.pruner, settings.pruning_ratio) if settings.inference == "pruned" else (None, None)
    return Answerer(model_folder, settings.max_new_tokens, pruner, ratio)


def answer_remaining(
    task: Task, answerer: "Answerer", image_sizes: Mapping[Path, tuple[int, int]], batch_size: int
) -> None:
    """Answer what a task lacks, batch by batch; each batch is on disk before the next one starts."""
    done, total = len(task.answers.texts), len(task.questions)
    # A log file gets a line every ten seconds instead of ten a second.
    interval = 0.1 if sys.stderr.isatty() else 10
    name = task.benchmark.name
    with tqdm(total=total, initial=done, desc=name, unit=" questions", mininterval=interval) as progress:
        for batch in answerer.make_batches(task.remaining, image_sizes, batch_size):
            start = time.perf_counter()
            texts, num_new_tokens = answerer.answer(batch)
            answers = {question.question_id: text for question, text in zip(batch, texts, strict=True)}
            task.answers.append(answers, time.perf_counter() - start, num_new_tokens)
            progress.update(len(batch))


def throughput(task: Task, settings: AnswerSettings) -> dict[str, Any]:
    """How fast one process answers, image loading included, model loading not."""
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
    tasks: list[Task], settings: AnswerSettings, folder: Path, tracking: dict[str, str], parent: ParentRun | None
) -> None:
    """Log <benchmark>_questions_per_second and so on as a run of its own; `folder` keeps what MLflow can't take now."""
    rates = ("questions_per_second", "new_tokens_per_second")
    metrics = {f"{task.benchmark.name}_{rate}": throughput(task, settings)[rate] for task in tasks for rate in rates}
    run = RunSpec(f"{settings.experiment}/{settings.inference}", parent, asdict(settings))
    with MetricLog(folder, tracking, run) as log:
        log.log(0, metrics)


def score(benchmark: str, data: str | Path, answers: str | Path, out: str | Path) -> dict[str, Any]:
    """Score an answers file by the official rules and write METRICS.json; returns its content.

    Args:
        benchmark: a name in BENCHMARKS.
        data: folder with the official files.
        answers: JSON lines in LLaVA's format, from whatever model, in any order.

    Raises:
        ConfigError, BenchmarkError: an unknown benchmark, or a file that is wrong; names file, line and field.
    """
    chosen, data = get_benchmark(benchmark), Path(data)
    given = read_answers(Path(answers), chosen)
    with naming_lines(given):
        records = chosen.score_answers(data, {question_id: text for question_id, (text, _) in given.items()})
    metrics, statistics = chosen.metrics(records), chosen.statistics(records)
    percent_interval = bootstrap_interval(chosen.name, statistics, chosen.percent_from_sums)
    interval = percent_interval
    if chosen.headline_statistics and chosen.headline_from_sums:
        interval = bootstrap_interval(chosen.name, chosen.headline_statistics(records), chosen.headline_from_sums)
    result = {
        "benchmark": chosen.name,
        "metric": chosen.headline,
        "score": metrics[chosen.headline],
        "interval": interval,
        "percent_metric": chosen.percent,
        "percent": metrics[chosen.percent],
        "percent_interval": percent_interval,
        "num_questions": len(records),
        "num_missing": sum(record.is_missing for record in records),
        "metrics": metrics,
        "by_category": by_category(records),
        "per_question": {record.question_id: record.score for record in records},
        "statistics": statistics.tolist(),
        "unit_ids": unit_ids(records),
        "checksum": sha256_of_file(chosen.question_file(data)),
        "prompt_version": PROMPT_VERSION,
    }
    write_json(out, result)
    return result


def submit(benchmark: str, data: str | Path, answers: str | Path, out: str | Path) -> None:
    """Write the file that a test split's server takes, in its format.

    Args:
        benchmark: a name in SERVER_BENCHMARKS.
        data, answers: as in `score`.

    Raises:
        ConfigError, BenchmarkError: an unknown benchmark, or a file that is wrong; names file, line and field.
    """
    chosen = get_server_benchmark(benchmark)
    given = read_answers(Path(answers), chosen)
    with naming_lines(given):
        content = chosen.submission(Path(data), {question_id: text for question_id, (text, _) in given.items()})
    write_atomic(out, content)
