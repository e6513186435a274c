"""ScienceQA-IMG: the test questions with an image, answered by an option's letter.

Files: problems.json and pid_splits.json (official) and llava_test_CQM-A.json (LLaVA's prompts); images in
images/test/<pid>/image.png. The rule is that of LLaVA's eval_science_qa.py.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dualspeed.benchmarks.files import find_path, get_field, read_json
from dualspeed.benchmarks.records import (
    LETTER_ANSWER,
    Benchmark,
    Question,
    Record,
    accuracy,
    accuracy_from_sums,
    official_key,
    other_accuracy,
    reject_duplicates,
    reject_unknown,
    sum_by_unit,
)
from dualspeed.errors import BenchmarkError

OPTIONS = ("A", "B", "C", "D", "E")
# The last dot takes any character, as in the official rule: "The answer is Cork." reads as C.
SENTENCE = re.compile(r"The answer is ([A-Z]).")


def question_file(folder: Path) -> Path:
    """LLaVA's question file."""
    return find_path(folder, "llava_test_CQM-A.json")


def load_questions(folder: Path) -> list[Question]:
    """The questions with an image."""
    path = question_file(folder)
    images = find_path(folder, "images/test")
    questions = []
    for number, line in enumerate(read_json(path, list)):
        place = f"{path}, entry {number}"
        if not isinstance(line, dict):
            raise BenchmarkError(f"{place}: expected an object, found {line!r}")
        if line.get("image") is None:
            continue
        official_id, image = get_field(line, "id", (str, int), place), get_field(line, "image", str, place)
        turns = get_field(line, "conversations", list, place)
        if not turns or not isinstance(turns[0], dict):
            raise BenchmarkError(f"{place}: field 'conversations' has no first turn")
        text = get_field(turns[0], "value", str, f"{place}, field 'conversations'")
        # LLaVA's script appends the request, which its file doesn't hold.
        prompt = text.replace("<image>", "").strip() + LETTER_ANSWER
        questions.append(Question(str(official_id), official_id, images / image, prompt))
    reject_duplicates([question.question_id for question in questions], path)
    return questions


def read_problems(folder: Path) -> dict[str, dict]:
    """Problems of the test split in its order, checked."""
    splits_path, problems_path = find_path(folder, "pid_splits.json"), find_path(folder, "problems.json")
    pids = get_field(read_json(splits_path, dict), "test", list, str(splits_path))
    problems = read_json(problems_path, dict)
    for pid in pids:
        place = f"{problems_path}, problem {pid}"
        problem = get_field(problems, str(pid), dict, str(problems_path))
        choices, answer = get_field(problem, "choices", list, place), get_field(problem, "answer", int, place)
        if not 0 <= answer < min(len(choices), len(OPTIONS)):
            raise BenchmarkError(f"{place}: field 'answer' is {answer}, but there are {len(choices)} choices")
        get_field(problem, "image", (str, type(None)), place)
    return {str(pid): problems[str(pid)] for pid in pids}


def parse_answer(text: str) -> str:
    """The option's letter, or FAILED, which is no option and so wrong."""
    if text in OPTIONS:
        return text
    if text[:1] in OPTIONS and text[1:3] == ". ":
        return text[0]
    letters = SENTENCE.findall(text)
    return letters[0] if len(letters) == 1 else "FAILED"


def score_answers(folder: Path, answers: Mapping[str, str]) -> list[Record]:
    """One record per test question with an image; answers to the test's text-only questions are left out."""
    problems = read_problems(folder)
    reject_unknown(answers, problems, find_path(folder, "pid_splits.json"))
    records = []
    for pid, problem in problems.items():
        if not problem["image"]:
            continue
        gold = OPTIONS[problem["answer"]]
        text, is_missing = answers.get(pid, ""), pid not in answers
        predicted = "FAILED" if is_missing else parse_answer(text)
        # lmms-eval takes a letter alone or before a period.
        others = {"lmms_eval": float(text == gold or text[:2] == f"{gold}.")}
        records.append(Record(pid, float(predicted == gold), gold, predicted, "image", pid, is_missing, others))
    return records


def metrics(records: Sequence[Record]) -> dict[str, float]:
    """The official IMG accuracy, which leaves missing answers out; counting them wrong; and by lmms-eval's rule."""
    answered = [record for record in records if not record.is_missing]
    return {
        "accuracy": accuracy(answered),
        "accuracy_missing_wrong": accuracy(records),
        "accuracy_lmms_eval": other_accuracy(records, "lmms_eval"),
        "num_answered": float(len(answered)),
    }


def statistics(records: Sequence[Record]) -> np.ndarray:
    """Right answers and answered questions per question: (questions, 2)."""
    return sum_by_unit(records, [(record.score, not record.is_missing) for record in records])


SCIENCEQA = Benchmark(
    name="scienceqa",
    headline="accuracy",
    percent="accuracy",
    question_file=question_file,
    load_questions=load_questions,
    answer_key=official_key,
    score_answers=score_answers,
    metrics=metrics,
    statistics=statistics,
    percent_from_sums=accuracy_from_sums,
    # The official script tells by this mark whether a question has an image.
    image_mark="<image>\n",
)
