"""MME: per image one question whose answer is yes and one whose answer is no.

Points are accuracy plus accuracy+ (share of images with both answers right), summed over categories.

Files: the official release, MME_Benchmark_release_version/<category>/ with <name>.txt (two lines: question, tab, Yes or
No) beside <name>.png or .jpg, or in separate folders questions_answers_YN/ and images/; and llava_mme.jsonl, LLaVA's
prompts. The rules are those of LLaVA's convert_answer_to_mme.py and the official calculation.py, but the two questions
of an image are found by its name instead of by line.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np

from dualspeed.benchmarks.files import find_path, get_field, read_json_lines, read_text
from dualspeed.benchmarks.records import (
    Benchmark,
    Question,
    Record,
    accuracy,
    accuracy_statistics,
    divide,
    reject_duplicates,
    reject_unknown,
)
from dualspeed.errors import BenchmarkError

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
# Last sentence of an official question, and LLaVA's replacement of it.
REQUESTS = ("Please answer yes or no.", "Answer the question using a single word or phrase.")


def question_file(folder: Path) -> Path:
    """LLaVA's question file."""
    return find_path(folder, "llava_mme.jsonl")


def release_folder(folder: Path) -> Path:
    """Folder that holds the categories: `folder`, or the official release in it, whose depth differs by release."""
    release = folder / "MME_Benchmark_release_version"
    for candidate in (release / "MME_Benchmark", release, folder):
        if any((candidate / category).is_dir() for category in PERCEPTION + COGNITION):
            return candidate
    raise BenchmarkError(f"{release}: holds no category; valid: {', '.join(PERCEPTION + COGNITION)}")


def make_key(category: str, name: str, text: str) -> str:
    """Id of a question: category, image name without its ending, and the question without LLaVA's or MME's request."""
    for request in REQUESTS:
        text = text.replace(request, "")
    return f"{category}/{name}: {' '.join(text.split())}"


def answer_key(record: dict, place: str) -> str:
    """Id of the question that a line of answers belongs to; both questions of an image have the same `question_id`."""
    return key_of(get_field(record, "question_id", str, place), get_field(record, "prompt", str, place))


def key_of(official_id: str, prompt: str) -> str:
    """Id of a question from LLaVA's question_id (category/image or category/images/image) and prompt."""
    path = PurePosixPath(official_id)
    return make_key(path.parts[0], path.stem, prompt)


def load_questions(folder: Path) -> list[Question]:
    """Questions in the order of LLaVA's file."""
    release = release_folder(folder)
    questions = []
    for place, line in read_json_lines(question_file(folder)):
        official_id, prompt = get_field(line, "question_id", str, place), get_field(line, "text", str, place)
        image = release / get_field(line, "image", str, place)
        if not os.path.exists(image):
            image = image.parent / "images" / image.name
        questions.append(Question(key_of(official_id, prompt), official_id, image, prompt))
    reject_duplicates([question.question_id for question in questions], question_file(folder))
    return questions


def read_labels(folder: Path) -> dict[str, tuple[str, str, str]]:
    """Official answers: {question id: (category, image, yes or no)}, images in alphabetical order."""
    labels: dict[str, tuple[str, str, str]] = {}
    release = release_folder(folder)
    for category in PERCEPTION + COGNITION:
        texts = release / category / "questions_answers_YN"
        for path in sorted((texts if texts.is_dir() else release / category).glob("*.txt")):
            lines = [line for line in read_text(path).split("\n") if line.strip()]
            if len(lines) != 2:
                raise BenchmarkError(f"{path}: has {len(lines)} questions, expected 2")
            for number, line in enumerate(lines, start=1):
                question, _, answer = line.strip().partition("\t")
                if answer not in ("Yes", "No"):
                    raise BenchmarkError(f"{path}, line {number}: answer is {answer!r} after the tab; valid: Yes, No")
                key = make_key(category, path.stem, question)
                if key in labels:
                    raise BenchmarkError(f"{path}, line {number}: the question occurs twice")
                labels[key] = (category, f"{category}/{path.stem}", answer.lower())
    if not labels:
        raise BenchmarkError(f"{release}: there is no <category>/*.txt")
    return labels


def parse_answer(text: str) -> str:
    """Answer by the official rule: yes, no or other, from the first four characters."""
    start = text.lower()[:4]
    if "yes" in start:
        return "yes"
    return "no" if "no" in start else "other"


def lmms_parse(text: str) -> str:
    """Answer by lmms-eval's rule: it strips the text, drops periods, and takes y and n too."""
    start = text.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(start) or parse_answer(start)


def score_answers(folder: Path, answers: Mapping[str, str]) -> list[Record]:
    """One record per official question. A missing answer is wrong."""
    labels = read_labels(folder)
    reject_unknown(answers, labels, release_folder(folder))
    records = []
    for key, (category, image, gold) in labels.items():
        is_missing = key not in answers
        predicted = "other" if is_missing else parse_answer(answers[key])
        others = {"lmms_eval": float(lmms_parse(answers.get(key, "")) == gold)}
        records.append(Record(key, float(predicted == gold), gold, predicted, category, image, is_missing, others))
    return records


def accuracy_plus(records: Sequence[Record]) -> float:
    """Share of images with both questions right, in percent."""
    sums = accuracy_statistics(records)
    return 100 * float((sums[:, 0] == sums[:, 1]).mean()) if len(sums) else 0.0


def points_by_category(records: Sequence[Record]) -> dict[str, float]:
    """Points (accuracy plus accuracy+) of each category that has records."""
    chosen = {
        category: [record for record in records if record.category == category] for category in PERCEPTION + COGNITION
    }
    return {category: accuracy(part) + accuracy_plus(part) for category, part in chosen.items() if part}


def sum_points(points: Mapping[str, float]) -> dict[str, float]:
    """Points of perception, and of cognition if the release has any of its categories."""
    result = {"perception": sum(points.get(category, 0.0) for category in PERCEPTION)}
    if not points.keys().isdisjoint(COGNITION):
        result["cognition"] = sum(points.get(category, 0.0) for category in COGNITION)
    return result


def metrics(records: Sequence[Record]) -> dict[str, float]:
    """Points of perception and cognition, accuracy, accuracy+, points by lmms-eval's rule, points per category."""
    points = points_by_category(records)
    as_lmms = [replace(record, score=record.other_scores["lmms_eval"]) for record in records]
    lmms_points = sum_points(points_by_category(as_lmms))
    result = sum_points(points) | {"acc": accuracy(records), "acc_plus": accuracy_plus(records)}
    result |= {f"{name}_lmms_eval": value for name, value in lmms_points.items()}
    return result | {f"points_{category}": value for category, value in points.items()}


def perception_statistics(records: Sequence[Record]) -> np.ndarray:
    """Four counts per image in the block of its category, zeros in the other blocks: (images, 40).

    The counts are right answers, questions, images with both answers right, and images, for each of the ten categories
    of perception.
    """
    sums = accuracy_statistics(records)
    both = (sums[:, 0] == sums[:, 1]).astype(float)
    counts = np.stack([*sums.T, both, np.ones(len(sums))], axis=1)
    categories = list({record.unit: record.category for record in records}.values())
    is_in = np.asarray([[category == name for name in PERCEPTION] for category in categories], dtype=float)
    return (is_in[:, :, None] * counts[:, None, :]).reshape(len(sums), -1)


def perception_from_sums(sums: np.ndarray) -> np.ndarray:
    """Points of perception from sums of `perception_statistics`: (..., 40) -> (...)."""
    right, questions, both, images = np.moveaxis(sums.reshape(*sums.shape[:-1], len(PERCEPTION), 4), -1, 0)
    return 100 * (divide(right, questions) + divide(both, images)).sum(axis=-1)


MME = Benchmark(
    name="mme",
    headline="perception",
    percent="acc",
    question_file=question_file,
    load_questions=load_questions,
    answer_key=answer_key,
    score_answers=score_answers,
    metrics=metrics,
    headline_statistics=perception_statistics,
    headline_from_sums=perception_from_sums,
)
