"""Example questions of each benchmark: picture, right answer, and the answer of each model.

Some are drawn at random, others among the questions that the models differ on; each says which. A sheet's examples are
the same every time.
"""

import base64
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from dualspeed.benchmarks import Benchmark, Question, Record, get_benchmark
from dualspeed.evaluation.answers import read_answers
from dualspeed.evaluation.images import image_as_asked
from dualspeed.layout import Layout
from dualspeed.settings.jobs import ReportSettings
from dualspeed.settings.names import BENCHMARK_LABELS, METHOD_LABELS, in_paper_order

RANDOM, DIFFERING = "drawn at random", "drawn among those that the models differ on"
NUM_EACH = 2  # examples of either kind
MAX_PIXELS = 320  # longest side of a picture


@dataclass(frozen=True)
class Answer:
    """Answer of one model."""

    text: str
    """Generated text."""
    score: float
    """Score by the official rule: 1 if right, 0 if wrong."""


@dataclass(frozen=True)
class Example:
    """One question with the answer of each model."""

    question_id: str
    """Key within the benchmark."""
    prompt: str
    """Text that the models got."""
    image: str | None
    """Picture as a data URI; None for a question without one."""
    gold: str
    """Right answer."""
    chosen: str
    """RANDOM or DIFFERING."""
    answers: tuple[Answer, ...]
    """One answer for each model, in the order of `Examples.models`."""


@dataclass(frozen=True)
class Examples:
    """The examples of one benchmark."""

    benchmark: str
    """Label of the benchmark."""
    models: tuple[str, ...]
    """Labels of the models."""
    examples: tuple[Example, ...]
    """Questions with the answers."""


def read_examples(settings: ReportSettings, summary: pd.DataFrame) -> list[Examples]:
    """Examples of each benchmark that some of the models have answered.

    Args:
        summary: lines to show; of each, the model of the first seed.
    """
    layout = Layout(settings.sheet.results)
    found = []
    for name in in_paper_order(settings.sheet.benchmarks):
        benchmark, folder = get_benchmark(name), Path(settings.folders[name])
        models = {}
        for line in summary.itertuples():
            answers = Path(layout.answer_file(line.experiments[0], line.inference, name))
            if answers.exists():
                models[f"{METHOD_LABELS[line.method]}, {line.inference} tokens"] = read_scored(
                    benchmark, folder, answers
                )
        if models:
            found.append(Examples(BENCHMARK_LABELS[name], tuple(models), choose(benchmark, folder, models)))
    return found


Scored = tuple[dict[str, str], dict[str, Record]]


def read_scored(benchmark: Benchmark, folder: Path, answers: Path) -> Scored:
    """Answers of a file, by question id: their texts, and their records with scores."""
    texts = {key: text for key, (text, _) in read_answers(answers, benchmark).items()}
    return texts, {record.question_id: record for record in benchmark.score_answers(folder, texts)}


def choose(benchmark: Benchmark, folder: Path, models: dict[str, Scored]) -> tuple[Example, ...]:
    """NUM_EACH examples of either kind, each of another question."""
    draw = random.Random(benchmark.name)
    scored = list(models.values())
    questions = [
        question
        for question in benchmark.load_questions(folder)
        if all(question.question_id in records for _, records in scored)
    ]
    picked = {
        question.question_id: (question, RANDOM) for question in draw.sample(questions, min(NUM_EACH, len(questions)))
    }
    differing = [
        question
        for question in questions
        if question.question_id not in picked
        and len({records[question.question_id].score for _, records in scored}) > 1
    ]
    for question in draw.sample(differing, min(NUM_EACH, len(differing))):
        picked[question.question_id] = (question, DIFFERING)
    return tuple(make_example(question, chosen, scored) for question, chosen in picked.values())


def make_example(question: Question, chosen: str, scored: Sequence[Scored]) -> Example:
    """Example of a question, with the answer of each model."""
    key = question.question_id
    return Example(
        question_id=key,
        prompt=question.prompt,
        image=embed_image(question.image) if question.image is not None else None,
        gold=scored[0][1][key].gold,
        chosen=chosen,
        answers=tuple(Answer(texts.get(key, ""), records[key].score) for texts, records in scored),
    )


def embed_image(path: Path) -> str:
    """Picture as a data URI, scaled down to MAX_PIXELS a side."""
    small = image_as_asked(path)
    small.thumbnail((MAX_PIXELS, MAX_PIXELS))
    content = io.BytesIO()
    small.save(content, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
