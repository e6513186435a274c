"""SEED-Bench, only its questions on images: multiple choice, answered by a letter.

Files: SEED-Bench.json (official) and llava-seed-bench.jsonl (LLaVA's prompts; those on frames of videos are left out
here), which also names the image files. The rule is that of LLaVA's convert_seed_for_submission.py: the answer is the
letter and nothing else. Ids are numbers in answers and text in annotations.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from dualspeed.benchmarks.files import check_entries, find_path, get_choice, get_field, read_json, read_json_lines
from dualspeed.benchmarks.records import (
    Benchmark,
    Question,
    Record,
    official_key,
    reject_duplicates,
    reject_unknown,
)
from dualspeed.errors import BenchmarkError

OPTIONS = ("A", "B", "C", "D")
NUMBER = re.compile("[0-9]+")


def question_file(folder: Path) -> Path:
    """LLaVA's question file."""
    return find_path(folder, "llava-seed-bench.jsonl")


def answer_key(record: dict, place: str) -> str:
    """Id as text, without leading zeros if it is a number."""
    key = official_key(record, place)
    return (key.lstrip("0") or "0") if NUMBER.fullmatch(key) else key


def read_official(folder: Path) -> tuple[dict[str, tuple[str, dict]], dict[int, str]]:
    """{id: (place, question)} for images and videos, and {number: name} of the question types."""
    path = find_path(folder, "SEED-Bench.json")
    content = read_json(path, dict)
    types = get_field(content, "question_type", dict, str(path))
    questions: dict[str, tuple[str, dict]] = {}
    entries = get_field(content, "questions", list, str(path))
    for place, entry in check_entries(entries, f"{path}: field 'questions', entry"):
        get_choice(entry, "data_type", ("image", "video"), place)
        key = answer_key(entry, place)
        if key in questions:
            raise BenchmarkError(f"{place}: field 'question_id': {key!r} occurs twice")
        questions[key] = (place, entry)
    numbers = {name: get_field(types, name, int, f"{path}: field 'question_type'") for name in types}
    return questions, {number: name for name, number in numbers.items()}


def load_questions(folder: Path) -> list[Question]:
    """Questions on images, in the order of LLaVA's file."""
    official, _ = read_official(folder)
    questions = []
    for place, line in read_json_lines(question_file(folder)):
        key = answer_key(line, place)
        if key not in official:
            raise BenchmarkError(f"{place}: field 'question_id': {key!r} is not in SEED-Bench.json")
        image, prompt = get_field(line, "image", str, place), get_field(line, "text", str, place)
        if official[key][1]["data_type"] == "image":
            questions.append(Question(key, line["question_id"], folder / image, prompt))
    reject_duplicates([question.question_id for question in questions], question_file(folder))
    return questions


def score_answers(folder: Path, answers: Mapping[str, str]) -> list[Record]:
    """One record per question on an image. A missing answer is wrong."""
    official, types = read_official(folder)
    reject_unknown(answers, official, find_path(folder, "SEED-Bench.json"))
    records = []
    for key, (place, entry) in official.items():
        if entry["data_type"] != "image":
            continue
        gold = get_choice(entry, "answer", OPTIONS, place)
        kind = get_field(entry, "question_type_id", int, place)
        answer, is_missing = answers.get(key, ""), key not in answers
        # lmms-eval reads the first character as the answer.
        others = {"lmms_eval": float(answer.strip()[:1] == gold)}
        score, category = float(answer == gold), types.get(kind, str(kind))
        records.append(Record(key, score, gold, answer, category, is_missing=is_missing, other_scores=others))
    return records


SEEDBENCH = Benchmark(
    name="seedbench",
    question_file=question_file,
    load_questions=load_questions,
    answer_key=answer_key,
    score_answers=score_answers,
)
