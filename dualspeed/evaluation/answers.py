"""Answers on disk: files in LLaVA's format, and the resumable state of a generation that is under way."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualspeed.benchmarks import Question, QuestionSet
from dualspeed.benchmarks.files import get_field, read_json_lines
from dualspeed.benchmarks.records import number_repeats
from dualspeed.errors import BenchmarkError, UnknownAnswerError
from dualspeed.files import sha256_of_json, write_atomic


def read_answers(path: Path, benchmark: QuestionSet) -> dict[str, tuple[str, str]]:
    """{question id: (text, place for errors)} of an answers file in LLaVA's format, in any order.

    Raises:
        BenchmarkError: a line that isn't JSON, lacks a field, or answers a question for the second time.
    """
    answers: dict[str, tuple[str, str]] = {}
    lines = read_json_lines(path)
    keys = [benchmark.answer_key(record, place) for place, record in lines]
    for key, (place, record) in zip(number_repeats(keys) if benchmark.repeats else keys, lines, strict=True):
        if key in answers:
            raise BenchmarkError(f"{place}: field 'question_id': {key!r} is answered by an earlier line too")
        answers[key] = (get_field(record, "text", str, place), place)
    return answers


@contextmanager
def naming_lines(answers: Mapping[str, tuple[str, str]]) -> Iterator[None]:
    """Turn the error that an answer is unknown into one that says where it stands."""
    try:
        yield
    except UnknownAnswerError as error:
        raise BenchmarkError(f"{answers[error.question_id][1]}: {error}") from None


def write_answers(
    path: Path, benchmark: QuestionSet, questions: list[Question], texts: Mapping[str, str], model_id: str
) -> None:
    """Write one line per question in official order, in LLaVA's format, so that the official scorers read it too.

    Answer ids follow from the question, so that a resumed file equals an uninterrupted one to the byte.
    """
    lines = []
    for question in questions:
        mark = benchmark.image_mark if question.image is not None else ""
        record: dict[str, Any] = {
            "question_id": question.official_id,
            "prompt": mark + question.prompt,
            "text": texts[question.question_id],
            "answer_id": sha256_of_json([model_id, benchmark.name, question.question_id])[:22],
            "model_id": model_id,
            "metadata": {},
        }
        lines.append(json.dumps(record) + "\n")
    write_atomic(path, "".join(lines))


@dataclass
class PartialAnswers:
    """Answers of a benchmark so far, one line of the state file for each batch.

    A line is written as a whole with its answers, so a kill loses at most the batch under way; the torn line it may
    leave is cut off when the file is opened again.
    """

    path: Path
    texts: dict[str, str]
    seconds: float = 0.0
    """Time spent on these answers, over all runs; loading the model is not in it."""
    num_new_tokens: int = 0

    @classmethod
    def open(cls, path: Path) -> "PartialAnswers":
        """Read the state file, if there is one, and cut off what follows its last whole line.

        Answers of the other state files in its folder, which other shards may be writing, count as given too.
        """
        partial = cls(path, {})
        for other in sorted(path.parent.glob("answers*.jsonl")):
            size = partial._read(other)
            if other == path and size < path.stat().st_size:
                os.truncate(path, size)
        return partial

    def _read(self, path: Path) -> int:
        """Add the whole lines of a state file; returns their bytes."""
        size = 0
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                batch = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                batch = None
            if batch is None:
                break
            self._add(batch)
            size += len(line)
        return size

    def append(self, texts: Mapping[str, str], seconds: float, num_new_tokens: int) -> None:
        """Add one batch and bring it to the file."""
        batch = {"texts": dict(texts), "seconds": seconds, "num_new_tokens": num_new_tokens}
        with self.path.open("ab") as file:
            file.write(json.dumps(batch).encode() + b"\n")
        self._add(batch)

    def _add(self, batch: dict) -> None:
        self.texts |= batch["texts"]
        self.seconds += batch["seconds"]
        self.num_new_tokens += batch["num_new_tokens"]
