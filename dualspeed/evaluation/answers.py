"""Answers on disk: files in LLaVA's format, and the resumable state of an unfinished generation."""

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
    for key, (place, record) in zip(number_repeats(keys) if benchmark.has_repeats else keys, lines, strict=True):
        if key in answers:
            raise BenchmarkError(f"{place}: field 'question_id': {key!r} is answered by an earlier line too")
        answers[key] = (get_field(record, "text", str, place), place)
    return answers


@contextmanager
def name_lines(answers: Mapping[str, tuple[str, str]]) -> Iterator[None]:
    """Raise the error of an unknown answer again, with the place of the answer in its file."""
    try:
        yield
    except UnknownAnswerError as error:
        raise BenchmarkError(f"{answers[error.question_id][1]}: {error}") from None


def write_answers(
    path: Path, benchmark: QuestionSet, questions: list[Question], texts: Mapping[str, str], model_id: str
) -> None:
    """Write one line per question, in official order and LLaVA's format, which the official scorers read too.

    Answer ids depend on the question alone, so that a resumed run writes the same bytes as an uninterrupted one.
    """
    lines = []
    for question in questions:
        placeholder = benchmark.image_placeholder if question.image is not None else ""
        record: dict[str, Any] = {
            "question_id": question.official_id,
            "prompt": placeholder + question.prompt,
            "text": texts[question.question_id],
            "answer_id": sha256_of_json([model_id, benchmark.name, question.question_id])[:22],
            "model_id": model_id,
            "metadata": {},
        }
        lines.append(json.dumps(record) + "\n")
    write_atomic(path, "".join(lines))


@dataclass
class PartialAnswers:
    """Answers of a benchmark so far; the state file has one line per batch.

    A line is appended when its batch is done, so that a kill loses at most the current batch. A torn last line is cut
    off when the file is opened again.
    """

    path: Path
    """State file of this process."""
    texts: dict[str, str]
    """{question id: answer}."""
    seconds: float = 0.0
    """Seconds spent on these answers over all runs, without loading of the model."""
    num_new_tokens: int = 0
    """Tokens generated for these answers."""

    @classmethod
    def open(cls, path: Path) -> "PartialAnswers":
        """Read the state file, if it exists, and cut off a torn last line.

        Answers in other state files of its folder, which other shards may be writing, count too.
        """
        partial = cls(path, {})
        for other in sorted(path.parent.glob("answers*.jsonl")):
            size = partial._read(other)
            if other == path and size < path.stat().st_size:
                os.truncate(path, size)
        return partial

    def _read(self, path: Path) -> int:
        """Add the whole lines of a state file and return their size in bytes."""
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
        """Add one batch, in memory and in the file."""
        batch = {"texts": dict(texts), "seconds": seconds, "num_new_tokens": num_new_tokens}
        with self.path.open("ab") as file:
            file.write(json.dumps(batch).encode() + b"\n")
        self._add(batch)

    def _add(self, batch: dict) -> None:
        self.texts |= batch["texts"]
        self.seconds += batch["seconds"]
        self.num_new_tokens += batch["num_new_tokens"]
