"""GQA, testdev balanced: short answers, exact match.

Files: testdev_balanced_questions.json (official) and llava_gqa_testdev_balanced.jsonl (LLaVA's prompts); images in
images/. The rule is LLaVA's convert_gqa_for_eval.py followed by the official eval.py: trailing periods go, lower case,
nothing else.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from dualspeed.benchmarks.files import BenchmarkError, find_path, get_field, read_json, read_json_lines
from dualspeed.benchmarks.records import (
    Benchmark,
    Question,
    Record,
    accuracy,
    accuracy_from_sums,
    accuracy_statistics,
    official_key,
    reject_duplicates,
    reject_unknown,
)


def question_file(folder: Path) -> Path:
    """LLaVA's question file."""
    return find_path(folder, "llava_gqa_testdev_balanced.jsonl")


def official_file(folder: Path) -> Path:
    """GQA's own file, with the answers."""
    name = "testdev_balanced_questions.json"
    return find_path(folder, name, f"data/{name}", f"data/questions1.2/{name}")


def load_questions(folder: Path) -> list[Question]:
    """Questions in the order of LLaVA's file."""
    images = find_path(folder, "images", "data/images")
    questions = []
    for place, line in read_json_lines(question_file(folder)):
        official_id = get_field(line, "question_id", (int, str), place)
        image, prompt = get_field(line, "image", str, place), get_field(line, "text", str, place)
        questions.append(Question(str(official_id), official_id, images / image, prompt))
    reject_duplicates([question.question_id for question in questions], question_file(folder))
    return questions


def parse_answer(text: str) -> str:
    """The answer as it is compared: no strip, so a blank before or after it makes it wrong, as officially."""
    return text.rstrip(".").lower()


def score_answers(folder: Path, answers: Mapping[str, str]) -> list[Record]:
    """One record per balanced question; a missing answer counts as wrong (the official script stops at it)."""
    path = official_file(folder)
    questions = read_json(path, dict)
    reject_unknown(answers, questions, path)
    records = []
    for question_id, question in questions.items():
        place = f"{path}, question {question_id}"
        if not isinstance(question, dict):
            raise BenchmarkError(f"{place}: expected an object, found {question!r}")
        gold = get_field(question, "answer", str, place)
        if not get_field(question, "isBalanced", bool, place):
            continue
        structure = get_field(get_field(question, "types", dict, place), "structural", str, f"{place}, field 'types'")
        is_missing = question_id not in answers
        predicted = "" if is_missing else parse_answer(answers[question_id])
        is_right = not is_missing and predicted == gold
        # The official script calls every question open that asks for a value, all others binary.
        category = "open" if structure == "query" else "binary"
        records.append(Record(question_id, float(is_right), gold, predicted, category, question_id, is_missing))
    return records


def metrics(records: Sequence[Record]) -> dict[str, float]:
    """Accuracy over all questions, and over open and binary ones where there are any."""
    result = {"accuracy": accuracy(records)}
    for category in ("open", "binary"):
        chosen = [record for record in records if record.category == category]
        if chosen:
            result[f"accuracy_{category}"] = accuracy(chosen)
    return result


GQA = Benchmark(
    name="gqa",
    headline="accuracy",
    percent="accuracy",
    question_file=question_file,
    load_questions=load_questions,
    answer_key=official_key,
    score_answers=score_answers,
    metrics=metrics,
    statistics=accuracy_statistics,
    percent_from_sums=accuracy_from_sums,
)
