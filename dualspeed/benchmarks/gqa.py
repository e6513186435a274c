"""GQA, testdev balanced: short answers, exact match.

Files: testdev_balanced_questions.json (official) and llava_gqa_testdev_balanced.jsonl (LLaVA's prompts); images in
images/. The rule is that of LLaVA's convert_gqa_for_eval.py and then the official eval.py: trailing periods are
removed, the case is ignored, and nothing else.
"""

import string
from collections.abc import Mapping, Sequence
from pathlib import Path

from dualspeed.benchmarks.files import check_object, find_path, get_field, read_json
from dualspeed.benchmarks.records import (
    Benchmark,
    Question,
    Record,
    accuracy,
    accuracy_by_rule,
    read_questions,
    reject_unknown,
)

NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def question_file(folder: Path) -> Path:
    """LLaVA's question file."""
    return find_path(folder, "llava_gqa_testdev_balanced.jsonl")


def official_file(folder: Path) -> Path:
    """Official file, with the answers."""
    name = "testdev_balanced_questions.json"
    return find_path(folder, name, f"data/{name}", f"data/questions1.2/{name}")


def load_questions(folder: Path) -> list[Question]:
    """Questions in the order of LLaVA's file."""
    return read_questions(question_file(folder), find_path(folder, "images", "data/images"))


def parse_answer(text: str) -> str:
    """Answer in the form that is compared. A space before or after it makes it wrong, as in the official script."""
    return text.rstrip(".").lower()


def lmms_form(text: str) -> str:
    """Answer in the form that lmms-eval compares: lower case, no punctuation."""
    return text.lower().translate(NO_PUNCTUATION)


def score_answers(folder: Path, answers: Mapping[str, str]) -> list[Record]:
    """One record per balanced question. A missing answer is wrong; the official script would stop at it."""
    path = official_file(folder)
    questions = read_json(path, dict)
    reject_unknown(answers, questions, path)
    records = []
    for question_id, question in questions.items():
        place = f"{path}, question {question_id}"
        gold = get_field(check_object(question, place), "answer", str, place)
        if not get_field(question, "isBalanced", bool, place):
            continue
        structure = get_field(get_field(question, "types", dict, place), "structural", str, f"{place}, field 'types'")
        is_missing = question_id not in answers
        predicted = "" if is_missing else parse_answer(answers[question_id])
        is_right = not is_missing and predicted == gold
        # In the official script, a question is open if it asks for a value, and binary otherwise.
        category = "open" if structure == "query" else "binary"
        others = {"lmms_eval": float(not is_missing and lmms_form(answers[question_id]) == lmms_form(gold))}
        records.append(
            Record(question_id, float(is_right), gold, predicted, category, is_missing=is_missing, other_scores=others)
        )
    return records


def metrics(records: Sequence[Record]) -> dict[str, float]:
    """Accuracy over all questions by both rules, and over open and over binary ones where there are any."""
    result = accuracy_by_rule(records)
    for category in ("open", "binary"):
        chosen = [record for record in records if record.category == category]
        if chosen:
            result[f"accuracy_{category}"] = accuracy(chosen)
    return result


GQA = Benchmark(
    name="gqa",
    question_file=question_file,
    load_questions=load_questions,
    score_answers=score_answers,
    metrics=metrics,
)
