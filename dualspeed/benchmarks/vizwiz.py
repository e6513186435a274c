"""VizWiz: val, which is scored here, and test, whose answers go to a server.

Files: val.json (official; images in val/), test.json's questions as LLaVA puts them, llava_test.jsonl (images in
test/). A question of val has its image's name for id, with or without its ending, or that name's number; a
llava_val.jsonl, if there is one, says instead which image an id of its own belongs to. The rule is that of the official
API: the answer is normalised, what the annotators wrote is not.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from dualspeed.benchmarks.files import find_path, get_field, read_json, read_json_lines
from dualspeed.benchmarks.records import (
    SHORT_ANSWER,
    Benchmark,
    Question,
    Record,
    ServerBenchmark,
    accuracy_from_sums,
    accuracy_statistics,
    official_and_lmms_accuracy,
    official_key,
    read_questions,
    reject_duplicates,
    reject_unknown,
)
from dualspeed.benchmarks.vqa_accuracy import clean, evalai, leave_one_out, normalise
from dualspeed.benchmarks.vqav2 import read_annotators
from dualspeed.errors import BenchmarkError

NUMBERED_IMAGE = re.compile(r"VizWiz_val_(\d+)")
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
PROMPT_END = UNANSWERABLE + SHORT_ANSWER


def question_file(folder: Path) -> Path:
    """The official questions and answers of val."""
    return find_path(folder, "val.json", "Annotations/val.json")


def read_entries(folder: Path) -> list[tuple[str, str, dict]]:
    """(place, image, entry) of each question of val."""
    path = question_file(folder)
    entries = []
    for number, entry in enumerate(read_json(path, list)):
        place = f"{path}, entry {number}"
        if not isinstance(entry, dict):
            raise BenchmarkError(f"{place}: expected an object, found {entry!r}")
        entries.append((place, get_field(entry, "image", str, place), entry))
    reject_duplicates([image for _, image, _ in entries], path)
    return entries


def load_questions(folder: Path) -> list[Question]:
    """Questions of val in official order, with the prompt that LLaVA gives those of test."""
    images = find_path(folder, "val", "images")
    return [
        Question(Path(image).stem, image, images / image, get_field(entry, "question", str, place) + PROMPT_END)
        for place, image, entry in read_entries(folder)
    ]


def answer_key(record: dict, place: str) -> str:
    """The image's name without its ending."""
    return official_key(record, place).removesuffix(".jpg")


def by_image(folder: Path, answers: Mapping[str, str], known: set[str]) -> dict[str, str]:
    """Answers by image; an id of llava_val.jsonl, or else a bare number, is translated. Raises UnknownAnswerError."""
    path = folder / "llava_val.jsonl"
    if path.exists():
        images = {
            answer_key(line, place): Path(get_field(line, "image", str, place)).stem
            for place, line in read_json_lines(path)
        }
    else:
        images = {str(int(found[1])): found[0] for found in map(NUMBERED_IMAGE.fullmatch, known) if found}
    reject_unknown(answers, known | images.keys(), question_file(folder))
    return {images.get(key, key): text for key, text in answers.items()}


def official_score(answer: str, annotators: Sequence[str]) -> float:
    """Accuracy of one answer by the official API."""
    return leave_one_out(normalise(clean(answer)), annotators)


def lmms_score(answer: str, annotators: Sequence[str]) -> float:
    """The same by lmms-eval, which normalises both sides."""
    return leave_one_out(evalai(answer), [evalai(other) for other in annotators])


def score_answers(folder: Path, answers: Mapping[str, str]) -> list[Record]:
    """One record per question of val; a missing answer is worth nothing (the official script stops at it)."""
    entries = read_entries(folder)
    answers = by_image(folder, answers, {Path(image).stem for _, image, _ in entries})
    records = []
    for place, image, entry in entries:
        key, annotators = Path(image).stem, read_annotators(entry, place)
        answer, is_missing = answers.get(key, ""), key not in answers
        score = 0.0 if is_missing else official_score(answer, annotators)
        others = {"lmms_eval": 0.0 if is_missing else lmms_score(answer, annotators)}
        gold, category = max(annotators, key=annotators.count), get_field(entry, "answer_type", str, place)
        records.append(Record(key, score, gold, answer, category, key, is_missing, others))
    return records


def test_file(folder: Path) -> Path:
    """LLaVA's questions of test."""
    return find_path(folder, "llava_test.jsonl")


def load_test_questions(folder: Path) -> list[Question]:
    """Questions of test in the order of LLaVA's file."""
    return read_questions(test_file(folder), find_path(folder, "test", "images"))


def submission(folder: Path, answers: Mapping[str, str]) -> bytes:
    """The list that the server takes: image and answer of every question, in the order of LLaVA's file."""
    path, entries = test_file(folder), []
    lines = read_json_lines(path)
    reject_unknown(answers, {official_key(line, place) for place, line in lines}, path)
    for place, line in lines:
        key = official_key(line, place)
        if key not in answers:
            raise BenchmarkError(f"{place}: question_id {key!r} has no answer; the server wants one to each question")
        entries.append({"image": get_field(line, "image", str, place), "answer": evalai(answers[key])})
    return json.dumps(entries).encode()


VIZWIZ = Benchmark(
    name="vizwiz",
    headline="accuracy",
    percent="accuracy",
    question_file=question_file,
    load_questions=load_questions,
    answer_key=answer_key,
    score_answers=score_answers,
    metrics=official_and_lmms_accuracy,
    statistics=accuracy_statistics,
    percent_from_sums=accuracy_from_sums,
)
VIZWIZ_TEST = ServerBenchmark(
    name="vizwiz_test",
    question_file=test_file,
    load_questions=load_test_questions,
    answer_key=official_key,
    submission=submission,
)
