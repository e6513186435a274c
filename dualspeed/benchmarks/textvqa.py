"""TextVQA, val 0.5.1: reading text in pictures, with and without the tokens that an OCR system found in the prompt.

Files: TextVQA_0.5.1_val.json (official) and llava_textvqa_val_v051_ocr.jsonl (LLaVA's prompts, with OCR tokens);
images in train_images/. Each question is asked twice, with LLaVA's prompt and without its OCR line. The rule is that
of LLaVA's eval_textvqa.py: image and lower-cased question are the key, so of two annotations with the same key the
later one counts for both; questions without an answer leave the denominator.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dualspeed.benchmarks.files import find_path, get_field, read_json, read_json_lines
from dualspeed.benchmarks.records import (
    Benchmark,
    Question,
    Record,
    accuracy,
    accuracy_from_sums,
    number_repeats,
    other_accuracy,
    reject_unknown,
    sum_by_unit,
)
from dualspeed.benchmarks.vqa_accuracy import evalai, leave_one_out
from dualspeed.errors import BenchmarkError

NUM_ANNOTATORS = 10
OCR = "Reference OCR token: "
WITHOUT_OCR = " (without OCR)"
# An older prompt of LLaVA's, which its scorer still reads.
OLD_PROMPT = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)


def question_file(folder: Path) -> Path:
    """LLaVA's question file."""
    return find_path(folder, "llava_textvqa_val_v051_ocr.jsonl")


def annotation_file(folder: Path) -> Path:
    """The official questions and answers."""
    return find_path(folder, "TextVQA_0.5.1_val.json")


def load_questions(folder: Path) -> list[Question]:
    """Every question with OCR tokens, in the order of LLaVA's file, then every question without."""
    images, lines = find_path(folder, "train_images", "images"), read_json_lines(question_file(folder))
    asked = []
    for place, line in lines:
        image = images / get_field(line, "image", str, place)
        asked.append((get_field(line, "question_id", str, place), image, get_field(line, "text", str, place), place))
    asked += [(key, image, without_ocr(prompt), place) for key, image, prompt, place in asked if OCR in prompt]
    keys = number_repeats(make_key(key, prompt, place) for key, _, prompt, place in asked)
    return [
        Question(question_id, key, image, prompt)
        for question_id, (key, image, prompt, _) in zip(keys, asked, strict=True)
    ]


def without_ocr(prompt: str) -> str:
    """A prompt without its line of OCR tokens."""
    return "\n".join(line for line in prompt.split("\n") if not line.startswith(OCR))


def read_prompt(prompt: str, place: str) -> tuple[str, bool]:
    """The lower-cased question of a prompt, and whether OCR tokens stand in it."""
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: ") and (found := OLD_PROMPT.search(prompt)):
        return found.group(1).lower(), True
    if OCR in prompt and len(lines) == 3:
        return lines[prompt.startswith(OCR)].lower(), True
    if len(lines) == 2:
        return lines[0].lower(), False
    raise BenchmarkError(f"{place}: field 'prompt' is {prompt!r}; expected question, OCR tokens (or not), request")


def make_key(image_id: str, prompt: str, place: str) -> str:
    """Id of a question: its image, its own words in lower case, and how it was asked."""
    question, has_ocr = read_prompt(prompt, place)
    return f"{image_id}: {question}{'' if has_ocr else WITHOUT_OCR}"


def answer_key(record: dict, place: str) -> str:
    """Id of the question that a line of answers belongs to; all of an image have its id for `question_id`."""
    return make_key(get_field(record, "question_id", str, place), get_field(record, "prompt", str, place), place)


def read_annotations(folder: Path) -> tuple[list[str], dict[str, list[str]]]:
    """Keys of the annotations in their order, and the annotators' answers by key."""
    path = annotation_file(folder)
    keys, annotators = [], {}
    for number, entry in enumerate(get_field(read_json(path, dict), "data", list, str(path))):
        place = f"{path}: field 'data', entry {number}"
        if not isinstance(entry, dict):
            raise BenchmarkError(f"{place}: expected an object, found {entry!r}")
        question = get_field(entry, "question", str, place)
        answers = get_field(entry, "answers", list, place)
        if len(answers) != NUM_ANNOTATORS or not all(isinstance(answer, str) for answer in answers):
            raise BenchmarkError(f"{place}: field 'answers' is {answers!r}; expected {NUM_ANNOTATORS} strings")
        keys.append(f"{get_field(entry, 'image_id', str, place)}: {question.lower()}")
        annotators[keys[-1]] = answers
    return keys, annotators


def score_answers(folder: Path, answers: Mapping[str, str]) -> list[Record]:
    """One record per annotation: the answer with OCR tokens counts, or the one without where no prompt has any."""
    keys, annotators = read_annotations(folder)
    numbered = [number_repeats(f"{key}{ending}" for key in keys) for ending in ("", WITHOUT_OCR)]
    reject_unknown(answers, {*numbered[0], *numbered[1]}, annotation_file(folder))
    has_ocr = not answers.keys().isdisjoint(numbered[0])
    records = []
    for key, *ids in zip(keys, *numbered, strict=True):
        golds = [evalai(answer) for answer in annotators[key]]
        scores = [leave_one_out(evalai(answers[each]), golds) if each in answers else None for each in ids]
        score = scores[0] if has_ocr else scores[1]
        text = answers.get(ids[0] if has_ocr else ids[1], "")
        names = ("with_ocr", "without_ocr")
        others = {name: value for name, value in zip(names, scores, strict=True) if value is not None}
        gold = max(golds, key=golds.count)
        records.append(Record(ids[0], score or 0.0, gold, text, "", ids[0], score is None, others))
    return records


def metrics(records: Sequence[Record]) -> dict[str, float]:
    """LLaVA's accuracy, which leaves missing answers out, one that counts them wrong, and one per kind of prompt."""
    answered = [record for record in records if not record.is_missing]
    result = {
        "accuracy": accuracy(answered),
        "accuracy_missing_wrong": accuracy(records),
        "num_answered": float(len(answered)),
    }
    for name in ("with_ocr", "without_ocr"):
        chosen = [record for record in records if name in record.others]
        if chosen:
            result[f"accuracy_{name}"] = other_accuracy(chosen, name)
    return result


def statistics(records: Sequence[Record]) -> np.ndarray:
    """Sum of scores and number of answered questions per question: (questions, 2)."""
    return sum_by_unit(records, [(record.score, not record.is_missing) for record in records])


TEXTVQA = Benchmark(
    name="textvqa",
    headline="accuracy",
    percent="accuracy",
    question_file=question_file,
    load_questions=load_questions,
    answer_key=answer_key,
    repeats=True,
    score_answers=score_answers,
    metrics=metrics,
    statistics=statistics,
    percent_from_sums=accuracy_from_sums,
)
