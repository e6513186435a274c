"""ScienceQA-IMG: the test questions with an image, answered by the letter of an option.

Files: problems.json and pid_splits.json (official) and llava_test_CQM-A.json (LLaVA's prompts); images in
images/test/<pid>/image.png. The rule is that of LLaVA's eval_science_qa.py.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from dualspeed.benchmarks.files import find_path, get_field, read_entries, read_json
from dualspeed.benchmarks.records import (
    LETTER_ANSWER,
    Benchmark,
    Question,
    Record,
    answered_accuracy,
    answered_statistics,
    other_accuracy,
    reject_duplicates,
    reject_unknown,
)
from dualspeed.errors import BenchmarkError

OPTIONS = ("A", "B", "C", "D", "E")
# The last dot matches any character, as in the official rule: "The answer is Cork." reads as C.
SENTENCE = re.compile(r"The answer is ([A-Z]).")


def question_file(folder: Path) -> Path:
    """LLaVA's question file."""
    return find_path(folder, "llava_test_CQM-A.json")


def load_questions(folder: Path) -> list[Question]:
    """Questions with an image."""
    path = question_file(folder)
    images = find_path(folder, "images/test")
    questions = []
    for place, line in read_entries(path):
        if line.get("image") is None:
            continue
        official_id, image = get_field(line, "id", (str, int), place), get_field(line, "image", str, place)
        turns = get_field(line, "conversations", list, place)
        if not turns or not isinstance(turns[0], dict):
            raise BenchmarkError(f"{place}: field 'conversations' has no first turn")
        text = get_field(turns[0], "value", str, f"{place}, field 'conversations'")
        # The request is not in LLaVA's file; its script appends it.
        prompt = text.replace("<image>", "").strip() + LETTER_ANSWER
        questions.append(Question(str(official_id), official_id, images / image, prompt))
    reject_duplicates([question.question_id for question in questions], path)
    return questions


def read_problems(folder: Path) -> dict[str, dict]:
    """Problems of the test split in its order; fields are checked."""
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
    """Letter of the option by the official rule, or FAILED, which is no option and so wrong."""
    if text in OPTIONS:
        return text
    if text[:1] in OPTIONS and text[1:3] == ". ":
        return text[0]
    letters = SENTENCE.findall(text)
    return letters[0] if len(letters) == 1 else "FAILED"


def score_answers(folder: Path, answers: Mapping[str, str]) -> list[Record]:
    """One record per test question with an image. Answers to text-only questions are ignored."""
    problems = read_problems(folder)
    reject_unknown(answers, problems, find_path(folder, "pid_splits.json"))
    records = []
    for pid, problem in problems.items():
        if not problem["image"]:
            continue
        gold = OPTIONS[problem["answer"]]
        text, is_missing = answers.get(pid, ""), pid not in answers
        predicted = "FAILED" if is_missing else parse_answer(text)
        # lmms-eval takes a letter that stands alone or before a period.
        others = {"lmms_eval": float(text == gold or text[:2] == f"{gold}.")}
        score = float(predicted == gold)
        records.append(Record(pid, score, gold, predicted, "image", is_missing=is_missing, other_scores=others))
    return records


def metrics(records: Sequence[Record]) -> dict[str, float]:
    """Official IMG accuracy, which ignores missing answers; with missing answers as wrong; by lmms-eval's rule."""
    return answered_accuracy(records) | {
        "accuracy_lmms_eval": other_accuracy(records, "lmms_eval"),
        "num_answered": float(sum(not record.is_missing for record in records)),
    }


SCIENCEQA = Benchmark(
    name="scienceqa",
    question_file=question_file,
    load_questions=load_questions,
    score_answers=score_answers,
    metrics=metrics,
    statistics=answered_statistics,
    # The official script recognises a question with an image by this placeholder.
    image_placeholder="<image>\n",
)
