"""VQAv2: val, which is scored here, and test-dev, whose answers go to a server.

Files of val: v2_OpenEnded_mscoco_val2014_questions.json and v2_mscoco_val2014_annotations.json (official), images in
val2014/. Files of test-dev: llava_vqav2_mscoco_test-dev2015.jsonl (questions) and llava_vqav2_mscoco_test2015.jsonl
(all questions that the server's file must have), images in test2015/. The rule is that of the official vqaEval.py,
which normalises neither side where all annotators agree.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from dualspeed.benchmarks.files import find_path, get_field, read_entries, read_json_lines
from dualspeed.benchmarks.records import (
    SHORT_ANSWER,
    Benchmark,
    Question,
    Record,
    ServerBenchmark,
    official_key,
    read_questions,
    reject_duplicates,
    reject_unknown,
)
from dualspeed.benchmarks.vqa_accuracy import clean, evalai, evalai_words, leave_one_out, normalise, read_annotators
from dualspeed.errors import BenchmarkError


def question_file(folder: Path) -> Path:
    """Official questions of val."""
    return find_path(folder, "v2_OpenEnded_mscoco_val2014_questions.json")


def annotation_file(folder: Path) -> Path:
    """Official answers of val."""
    return find_path(folder, "v2_mscoco_val2014_annotations.json")


def load_questions(folder: Path) -> list[Question]:
    """Questions of val in official order, in the form of LLaVA's prompts for test-dev."""
    path, images = question_file(folder), find_path(folder, "val2014", "images")
    questions = []
    for place, entry in read_entries(path, "questions"):
        official_id, image = get_field(entry, "question_id", int, place), get_field(entry, "image_id", int, place)
        prompt = get_field(entry, "question", str, place) + SHORT_ANSWER
        questions.append(Question(str(official_id), official_id, images / f"COCO_val2014_{image:012d}.jpg", prompt))
    reject_duplicates([question.question_id for question in questions], path)
    return questions


def official_score(answer: str, annotators: Sequence[str]) -> float:
    """Score of one answer by vqaEval.py."""
    answer, annotators = clean(answer), [clean(other) for other in annotators]
    if len(set(annotators)) > 1:
        answer, annotators = normalise(answer), [normalise(other) for other in annotators]
    return leave_one_out(answer, annotators)


def lmms_score(answer: str, annotators: Sequence[str]) -> float:
    """Score of one answer by lmms-eval, which normalises it always, and a second time unless all annotators agree."""
    answer, annotators = evalai(answer), [clean(other) for other in annotators]
    if len(set(annotators)) > 1:
        answer, annotators = evalai_words(answer), [evalai_words(other) for other in annotators]
    return leave_one_out(answer, annotators)


def score_answers(folder: Path, answers: Mapping[str, str]) -> list[Record]:
    """One record per annotated question. A missing answer is the empty one, as for the server; it may earn credit."""
    path = annotation_file(folder)
    asked = {official_key(entry, place) for place, entry in read_entries(question_file(folder), "questions")}
    reject_unknown(answers, asked, question_file(folder))
    records = []
    for place, entry in read_entries(path, "annotations"):
        question_id = str(get_field(entry, "question_id", int, place))
        if question_id not in asked:
            raise BenchmarkError(f"{place}: field 'question_id': {question_id} is not in {question_file(folder)}")
        annotators = read_annotators(entry, place)
        gold = get_field(entry, "multiple_choice_answer", str, place)
        category = get_field(entry, "answer_type", str, place)
        answer, is_missing = answers.get(question_id, ""), question_id not in answers
        score, others = official_score(answer, annotators), {"lmms_eval": lmms_score(answer, annotators)}
        records.append(Record(question_id, score, gold, answer, category, is_missing=is_missing, other_scores=others))
    reject_duplicates([record.question_id for record in records], path)
    if len(records) < len(asked):
        missing = min(asked - {record.question_id for record in records})
        raise BenchmarkError(f"{path}: field 'annotations' lacks question {missing} of {question_file(folder)}")
    return records


def test_file(folder: Path) -> Path:
    """LLaVA's question file of test-dev."""
    return find_path(folder, "llava_vqav2_mscoco_test-dev2015.jsonl")


def load_test_questions(folder: Path) -> list[Question]:
    """Questions of test-dev in the order of LLaVA's file."""
    return read_questions(test_file(folder), find_path(folder, "test2015", "images"))


def submission(folder: Path, answers: Mapping[str, str]) -> bytes:
    """JSON list for EvalAI: all questions of test in the order of their file, with "" for those not answered."""
    path = find_path(folder, "llava_vqav2_mscoco_test2015.jsonl")
    ids = [get_field(line, "question_id", (int, str), place) for place, line in read_json_lines(path)]
    reject_unknown(answers, {str(official_id) for official_id in ids}, path)
    texts = [evalai(answers[str(official_id)]) if str(official_id) in answers else "" for official_id in ids]
    entries = [{"question_id": key, "answer": text} for key, text in zip(ids, texts, strict=True)]
    return json.dumps(entries).encode()


VQAV2 = Benchmark(
    name="vqav2",
    question_file=question_file,
    load_questions=load_questions,
    score_answers=score_answers,
)
VQAV2_TEST = ServerBenchmark(
    name="vqav2_test",
    question_file=test_file,
    load_questions=load_test_questions,
    submission=submission,
)
