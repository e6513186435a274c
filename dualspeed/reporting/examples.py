"""Questions of the benchmarks with their picture, the right answer, and what each model said.

Which questions: some at random, the same ones every time, and some on which the models differ; each says which it is.
"""

import base64
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from dualspeed.benchmarks import Benchmark, Question, Record, get_benchmark
from dualspeed.evaluation.answers import read_answers
from dualspeed.settings.names import BENCHMARK_LABELS, METHOD_LABELS, in_paper_order

RANDOM, DIFFERING = "drawn at random", "drawn among those that the models differ on"
NUM_EACH = 2
MAX_PIXELS = 320


@dataclass(frozen=True)
class Answer:
    """What one model said."""

    text: str
    score: float
    """1 if right by the official rule, 0 if wrong."""


@dataclass(frozen=True)
class Example:
    """One question with every model's answer, in the order of the models."""

    question_id: str
    prompt: str
    image: str | None
    """As a data URI."""
    gold: str
    chosen: str
    """RANDOM or DIFFERING."""
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Examples:
    """The examples of one benchmark."""

    benchmark: str
    models: tuple[str, ...]
    examples: tuple[Example, ...]


def read_examples(settings: dict[str, Any], rows: pd.DataFrame) -> list[Examples]:
    """Examples of each benchmark that some of the models have answered.

    Args:
        settings: as of `tables.write_tables`, and "folders": {benchmark: folder of its official files}.
        rows: of a summary: their first seed's model is shown, in each way of inference.
    """
    found = []
    for name in in_paper_order(settings["benchmarks"]):
        benchmark, folder = get_benchmark(name), Path(settings["folders"][name])
        models = {}
        for row in rows.itertuples():
            experiment = row.experiments.split("; ")[0]
            answers = Path(settings["results"]) / "answers" / experiment / row.inference / f"{name}.jsonl"
            if answers.exists() and hasattr(benchmark, "score_answers"):
                models[f"{METHOD_LABELS[row.method]}, {row.inference} tokens"] = read_scored(benchmark, folder, answers)
        if models:
            found.append(Examples(BENCHMARK_LABELS.get(name, name), tuple(models), choose(benchmark, folder, models)))
    return found


Scored = tuple[dict[str, str], dict[str, Record]]


def read_scored(benchmark: Benchmark, folder: Path, answers: Path) -> Scored:
    """{question id: text} and {question id: record} of an answers file."""
    texts = {key: text for key, (text, _) in read_answers(answers, benchmark).items()}
    return texts, {record.question_id: record for record in benchmark.score_answers(folder, texts)}


def choose(benchmark: Benchmark, folder: Path, models: dict[str, Scored]) -> tuple[Example, ...]:
    """NUM_EACH examples of either kind, with no question twice."""
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
    """A question with its picture and all answers."""
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
    """A picture as a data URI, no larger than MAX_PIXELS a side."""
    with Image.open(path) as image:
        small = image.convert("RGB")
        small.thumbnail((MAX_PIXELS, MAX_PIXELS))
    content = io.BytesIO()
    small.save(content, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
