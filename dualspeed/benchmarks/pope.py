"""POPE: is an object in the image? Mean F1 over three splits, which choose absent objects in three ways.

Files: coco_pope_{random,popular,adversarial}.json (JSON lines with labels) and LLaVA's llava_pope_test.jsonl (prompts,
with ids that are unique over all splits); images in images/ or val2014/. The rule is that of LLaVA's eval_pope.py, but
answers and labels are paired by image and question instead of by line.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dualspeed.benchmarks.files import find_path, get_choice, get_field, read_json_lines
from dualspeed.benchmarks.records import (
    SHORT_ANSWER,
    Benchmark,
    Question,
    Record,
    accuracy,
    divide,
    official_key,
    reject_duplicates,
    reject_unknown,
    sum_by_unit,
)
from dualspeed.errors import BenchmarkError

SPLITS = ("random", "popular", "adversarial")


def question_file(folder: Path) -> Path:
    """LLaVA's question file."""
    return find_path(folder, "llava_pope_test.jsonl")


def read_prompts(folder: Path) -> list[tuple[str, dict]]:
    """(place, line) of the question file; fields are checked."""
    lines = read_json_lines(question_file(folder))
    for place, line in lines:
        get_field(line, "image", str, place)
        get_field(line, "text", str, place)
        get_choice(line, "category", SPLITS, place)
    reject_duplicates([official_key(line, place) for place, line in lines], question_file(folder))
    return lines


def load_questions(folder: Path) -> list[Question]:
    """Questions of all splits."""
    images = find_path(folder, "images", "val2014")
    return [
        Question(official_key(line, place), line["question_id"], images / line["image"], line["text"])
        for place, line in read_prompts(folder)
    ]


def read_labels(folder: Path) -> dict[tuple[str, str, str], str]:
    """Official labels: {(split, image, question): yes or no}."""
    labels: dict[tuple[str, str, str], str] = {}
    for split in SPLITS:
        path = find_path(folder, f"coco_pope_{split}.json", f"coco/coco_pope_{split}.json")
        for place, line in read_json_lines(path):
            key = (split, get_field(line, "image", str, place), get_field(line, "text", str, place).strip())
            label = get_choice(line, "label", ("yes", "no"), place)
            if labels.setdefault(key, label) != label:
                raise BenchmarkError(f"{place}: field 'label' is {label!r}, but the same question had another label")
    return labels


def parse_answer(text: str) -> str:
    """Answer by the official rule: no if the first sentence has No, no or not as a word, else yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def score_answers(folder: Path, answers: Mapping[str, str]) -> list[Record]:
    """One record per question. A missing answer is wrong: no where yes is right, and yes where no is."""
    labels = read_labels(folder)
    questions = read_prompts(folder)
    reject_unknown(answers, {official_key(line, place) for place, line in questions}, question_file(folder))
    asked = set()
    records = []
    for place, line in questions:
        key = (line["category"], line["image"], line["text"].removesuffix(SHORT_ANSWER).strip())
        if key not in labels:
            raise BenchmarkError(f"{place}: fields 'image' and 'text' are not in coco_pope_{line['category']}.json")
        asked.add(key)
        question_id, label = official_key(line, place), labels[key]
        is_missing = question_id not in answers
        wrong = "no" if label == "yes" else "yes"
        predicted = wrong if is_missing else parse_answer(answers[question_id])
        score = float(predicted == label)
        others = {f"lmms_{word}": float(answers.get(question_id, "").strip().lower() == word) for word in ("yes", "no")}
        records.append(
            Record(question_id, score, label, predicted, line["category"], is_missing=is_missing, other_scores=others)
        )
    if unasked := sorted(labels.keys() - asked):
        split, image, text = unasked[0]
        raise BenchmarkError(f"{question_file(folder)}: lacks {text!r} on {image} of coco_pope_{split}.json")
    return records


def confusion(records: Sequence[Record]) -> list[tuple[int, int, int]]:
    """True positive, false positive and false negative, each 0 or 1, of each record; yes is the positive class."""
    answers = [(record.predicted == "yes", record.gold == "yes") for record in records]
    return [(int(yes and gold), int(yes and not gold), int(gold and not yes)) for yes, gold in answers]


def lmms_f1(records: Sequence[Record]) -> float:
    """F1 in percent by lmms-eval's rule: over all splits at once; only the exact words yes and no are counted."""
    tp = sum(record.other_scores["lmms_yes"] for record in records if record.gold == "yes")
    fp = sum(record.other_scores["lmms_yes"] for record in records if record.gold == "no")
    fn = sum(record.other_scores["lmms_no"] for record in records if record.gold == "yes")
    return 100 * float(divide(2 * tp, 2 * tp + fp + fn))


def metrics(records: Sequence[Record]) -> dict[str, float]:
    """F1, accuracy, precision, recall and share of yes, as mean of the splits and per split, and lmms-eval's F1."""
    splits: dict[str, dict[str, float]] = {}
    for split in SPLITS:
        chosen = [record for record in records if record.category == split]
        tp, fp, fn = np.sum(confusion(chosen), axis=0) if chosen else (0, 0, 0)
        splits[split] = {
            "f1": 100 * float(divide(2 * tp, 2 * tp + fp + fn)),
            "accuracy": accuracy(chosen),
            "precision": 100 * float(divide(tp, tp + fp)),
            "recall": 100 * float(divide(tp, tp + fn)),
            "yes_ratio": 100 * float(divide(tp + fp, len(chosen))),
        }
    means = {name: sum(splits[split][name] for split in SPLITS) / len(SPLITS) for name in splits["random"]}
    means["f1_lmms_eval"] = lmms_f1(records)
    return means | {f"{name}_{split}": value for split in SPLITS for name, value in splits[split].items()}


def statistics(records: Sequence[Record]) -> np.ndarray:
    """Confusion counts per question in the block of its split, zeros in the other two: (questions, 9)."""
    counts = np.asarray(confusion(records))
    in_split = np.asarray([[record.category == split for split in SPLITS] for record in records])
    return sum_by_unit(records, (in_split[:, :, None] * counts[:, None, :]).reshape(len(records), -1))


def mean_f1_from_sums(sums: np.ndarray) -> np.ndarray:
    """Mean F1 of the splits in percent from sums of `statistics`: (..., 9) -> (...)."""
    tp, fp, fn = np.moveaxis(sums.reshape(*sums.shape[:-1], len(SPLITS), 3), -1, 0)
    return 100 * divide(2 * tp, 2 * tp + fp + fn).mean(axis=-1)


POPE = Benchmark(
    name="pope",
    headline="f1",
    percent="f1",
    question_file=question_file,
    load_questions=load_questions,
    score_answers=score_answers,
    metrics=metrics,
    statistics=statistics,
    percent_from_sums=mean_f1_from_sums,
)
