"""TextVQA, val 0.5.1: reading text in images, with the tokens of an OCR system in the prompt and without them.

Files: TextVQA_0.5.1_val.json (official) and llava_textvqa_val_v051_ocr.jsonl (LLaVA's prompts, with OCR tokens);
images in train_images/. Each question is asked twice, with LLaVA's prompt and without its OCR line. The rule is that
of LLaVA's eval_textvqa.py: the key is image and lower-cased question, so the later of two annotations with the same
key counts for both; questions without an answer are left out of the mean.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from dualspeed.benchmarks.files import find_path, get_field, read_entries, read_json_lines
from dualspeed.benchmarks.records import (
    Benchmark,
    Question,
    Record,
    answered_accuracy,
    answered_statistics,
    number_repeats,
    other_accuracy,
    reject_unknown,
)
from dualspeed.benchmarks.vqa_accuracy import evalai, leave_one_out
from dualspeed.errors import BenchmarkError

NUM_ANNOTATORS = 10
OCR = "Reference OCR token: "
WITHOUT_OCR = " (without OCR)"
WITH = "with_ocr"
KINDS = {WITH: "", "without_ocr": WITHOUT_OCR}
"""Kind of prompt -> what the ids of its questions end with."""
# Older form of LLaVA's prompts, which its scorer still reads.
OLD_PROMPT = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)


def question_file(folder: Path) -> Path:
    """LLaVA's question file."""
    return find_path(folder, "llava_textvqa_val_v051_ocr.jsonl")


def annotation_file(folder: Path) -> Path:
    """Official questions and answers."""
    return find_path(folder, "TextVQA_0.5.1_val.json")


def load_questions(folder: Path) -> list[Question]:
    """Every question with OCR tokens, in the order of LLaVA's file, then every question without them."""
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
    """Prompt without its line of OCR tokens."""
    return "\n".join(line for line in prompt.split("\n") if not line.startswith(OCR))


def read_prompt(prompt: str, place: str) -> tuple[str, bool]:
    """(question in lower case, True if the prompt has OCR tokens)."""
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: ") and (found := OLD_PROMPT.search(prompt)):
        return found.group(1).lower(), True
    if OCR in prompt and len(lines) == 3:
        return lines[prompt.startswith(OCR)].lower(), True
    if len(lines) == 2:
        return lines[0].lower(), False
    raise BenchmarkError(f"{place}: field 'prompt' is {prompt!r}; expected question, OCR tokens (or not), request")


def make_key(image_id: str, prompt: str, place: str) -> str:
    """Id of a question: its image, its text in lower case, and whether the prompt has OCR tokens."""
    question, has_ocr = read_prompt(prompt, place)
    return f"{image_id}: {question}{'' if has_ocr else WITHOUT_OCR}"


def answer_key(record: dict, place: str) -> str:
    """Id of the question that a line of answers belongs to; `question_id` is only the image's id."""
    return make_key(get_field(record, "question_id", str, place), get_field(record, "prompt", str, place), place)


def read_annotations(folder: Path) -> tuple[list[str], dict[str, list[str]]]:
    """Keys of the annotations in official order, and {key: the annotators' answers}."""
    keys, annotators = [], {}
    for place, entry in read_entries(annotation_file(folder), "data"):
        question = get_field(entry, "question", str, place)
        answers = get_field(entry, "answers", list, place)
        if len(answers) != NUM_ANNOTATORS or not all(isinstance(answer, str) for answer in answers):
            raise BenchmarkError(f"{place}: field 'answers' is {answers!r}; expected {NUM_ANNOTATORS} strings")
        keys.append(f"{get_field(entry, 'image_id', str, place)}: {question.lower()}")
        annotators[keys[-1]] = answers
    return keys, annotators


def pair_answers(keys: Sequence[str], answers: Mapping[str, str]) -> tuple[list[dict[str, str]], bool]:
    """({kind of prompt: answer} of each annotation, True if a question has answers of both kinds).

    Two annotations with the same key have two answers, of whatever kind.
    """
    ids = {kind: number_repeats(f"{key}{ending}" for key in keys) for kind, ending in KINDS.items()}
    pairs = [
        {kind: answers[name] for kind, name in zip(ids, names, strict=True) if name in answers}
        for names in zip(*ids.values(), strict=True)
    ]
    given: dict[str, list[tuple[str, str]]] = {}
    for key, pair in zip(keys, pairs, strict=True):
        given.setdefault(key, []).extend(pair.items())
    num_asked = Counter(keys)
    if any(len(found) > num_asked[key] for key, found in given.items()):
        return pairs, True
    return [dict([given[key].pop(0)]) if given[key] else {} for key in keys], False


def score_answers(folder: Path, answers: Mapping[str, str]) -> list[Record]:
    """One record per annotation.

    LLaVA's script takes every answer, whatever the form of its prompt. But where a question has one with OCR tokens and
    one without them, as ours have, only those with them count.
    """
    keys, annotators = read_annotations(folder)
    ids = number_repeats(keys)
    reject_unknown(answers, {*ids, *number_repeats(f"{key}{WITHOUT_OCR}" for key in keys)}, annotation_file(folder))
    pairs, is_asked_twice = pair_answers(keys, answers)
    records = []
    for question_id, key, pair in zip(ids, keys, pairs, strict=True):
        golds = [evalai(answer) for answer in annotators[key]]
        scores = {kind: leave_one_out(evalai(text), golds) for kind, text in pair.items()}
        counted = WITH if is_asked_twice else next(iter(pair), WITH)
        score, text, gold = scores.get(counted), pair.get(counted, ""), max(golds, key=golds.count)
        records.append(Record(question_id, score or 0.0, gold, text, is_missing=score is None, other_scores=scores))
    return records


def metrics(records: Sequence[Record]) -> dict[str, float]:
    """LLaVA's accuracy, which ignores missing answers; with missing answers as wrong; per kind of prompt."""
    result = answered_accuracy(records) | {"num_answered": float(sum(not record.is_missing for record in records))}
    for name in KINDS:
        chosen = [record for record in records if name in record.other_scores]
        if chosen:
            result[f"accuracy_{name}"] = other_accuracy(chosen, name)
    return result


TEXTVQA = Benchmark(
    name="textvqa",
    question_file=question_file,
    load_questions=load_questions,
    answer_key=answer_key,
    has_repeats=True,
    score_answers=score_answers,
    metrics=metrics,
    statistics=answered_statistics,
)
