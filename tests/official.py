"""Small benchmarks in the exact official formats, with answers on which the official rules show their oddities.

Each table below is (question, gold, answer or None, is it right?) with the verdicts worked out by hand.
"""

import json
import random
from pathlib import Path

import numpy as np
from PIL import Image

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
OBJECTS = ("snowboard", "car", "person", "dining table", "backpack", "chair")

# split -> (label, answer, how it reads): what isn't exactly No, no or not in the first sentence is a yes.
POPE = {
    "random": [
        ("yes", "Yes", "yes"),
        ("yes", "NO", "yes"),
        ("yes", "Yes, there is no doubt", "no"),
        ("no", "no", "no"),
        ("no", "Nope", "yes"),
        ("no", "No.", "no"),
    ],
    "popular": [
        ("yes", "", "yes"),
        ("no", "no!", "yes"),
        ("yes", None, "no"),
        ("no", None, "yes"),
    ],
    "adversarial": [
        ("yes", "Yes. No other", "yes"),
        ("no", "There is not one.", "no"),
        ("yes", "Not sure", "yes"),
        ("no", "No, there isn't", "no"),
    ],
}
POPE_METRICS = {
    "f1": 100 * (2 / 3 + 2 / 5 + 1) / 3,
    "f1_random": 100 * 2 / 3,  # 2 true positives, 1 false positive, 1 false negative
    "accuracy_random": 100 * 4 / 6,
    "precision_random": 100 * 2 / 3,
    "recall_random": 100 * 2 / 3,
    "yes_ratio_random": 50.0,
    "f1_popular": 40.0,  # 1 true positive, 2 false positives, 1 false negative
    "accuracy_popular": 25.0,
    "yes_ratio_popular": 75.0,
    "f1_adversarial": 100.0,
}

# (structural type, gold, answer, right): only trailing periods and capitals are forgiven.
GQA = [
    ("query", "red", "red", 1),
    ("query", "red", "Red.", 1),
    ("query", "red", "RED...", 1),
    ("query", "red", " red", 0),
    ("query", "red", "red .", 0),
    ("query", "red", "the red", 0),
    ("query", "2", "two", 0),
    ("query", "left", None, 0),
    ("verify", "yes", "Yes", 1),
    ("logical", "no", "no,", 0),
    ("choose", "traffic light", "traffic light.", 1),
    ("compare", "no", "", 0),
]
GQA_METRICS = {"accuracy": 100 * 5 / 12, "accuracy_open": 100 * 3 / 8, "accuracy_binary": 100 * 2 / 4}

# (number of choices, gold, answer, right): a letter, "X. ", or one "The answer is X" and one more character.
SCIENCEQA = [
    (3, "A", "A", 1),
    (3, "B", "B.", 0),
    (3, "B", "B. the blue one", 1),
    (3, "C", "The answer is C", 0),
    (3, "C", "The answer is C.", 1),
    (3, "C", "The answer is Cork.", 1),
    (3, "A", "The answer is A. The answer is A.", 0),
    (3, "A", "a", 0),
    (3, "A", " A", 0),
    (3, "B", "(B)", 0),
    (2, "B", "C. out of range", 0),
    (5, "E", "E", 1),
    (3, "C", "B", 0),
    (3, "A", None, 0),
]
SCIENCEQA_METRICS = {"accuracy": 100 * 5 / 13, "accuracy_missing_wrong": 100 * 5 / 14, "num_answered": 13.0}

# category -> one pair per image: (answer to the yes question, right), (answer to the no question, right).
MME = {
    "artwork": [(("Yes.", 1), ("No.", 1)), (("eyes", 1), ("know", 1))],
    "existence": [(("Snow", 0), ("NO", 1)), (("The answer is yes", 0), ("**No**", 1)), (("**Yes**", 0), (None, 0))],
    "code_reasoning": [((" yes", 1), ("yes", 0)), (("", 0), ("not", 1))],
}
MME_METRICS = {
    "perception": 100 + 100 + 100 * 2 / 6 + 0,
    "cognition": 100 * 2 / 4 + 0,
    "acc": 100 * 8 / 14,
    "acc_plus": 100 * 2 / 7,
    "points_artwork": 200.0,
    "points_existence": 100 * 2 / 6,
    "points_code_reasoning": 50.0,
}
METRICS = {"pope": POPE_METRICS, "gqa": GQA_METRICS, "scienceqa": SCIENCEQA_METRICS, "mme": MME_METRICS}
NUM_QUESTIONS = {"pope": 14, "gqa": 12, "scienceqa": 14, "mme": 14}
NUM_MISSING = {"pope": 2, "gqa": 1, "scienceqa": 1, "mme": 1}


def write_image(path: Path, seed: int) -> None:
    """A picture of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (28, 28, 3), dtype=np.uint8)).save(path)


def write_lines(path: Path, records: list[dict]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_pope(folder: Path) -> list[dict]:
    """Write the files; returns the answers."""
    questions, answers = [], []
    for split, rows in POPE.items():
        labels = []
        for row, (label, text, _) in enumerate(rows):
            image, question_id = f"COCO_val2014_{row:012d}.jpg", len(questions) + 1
            question = f"Is there a {OBJECTS[row]} in the image?"
            labels.append({"question_id": row + 1, "image": image, "text": question, "label": label})
            prompt = question + SHORT_ANSWER
            questions.append({"question_id": question_id, "image": image, "text": prompt, "category": split})
            if text is not None:
                answers.append({"question_id": question_id, "prompt": prompt, "text": text})
            write_image(folder / "images" / image, row)
        write_lines(folder / f"coco_pope_{split}.json", labels)
    write_lines(folder / "llava_pope_test.jsonl", questions)
    return answers


def write_gqa(folder: Path) -> list[dict]:
    """Write the files, with a question beside the balanced ones that doesn't count; returns the answers."""
    official, questions, answers = {}, [], []
    for row, (structure, gold, text, _) in enumerate([*GQA, ("query", "red", "red", 1)]):
        question_id, image = str(201307250 + row), f"n{row % 4}"
        official[question_id] = {
            "semantic": [],
            "entailed": [question_id],
            "equivalent": [question_id],
            "question": f"What is it, {row}?",
            "imageId": image,
            "isBalanced": row < len(GQA),
            "groups": {"global": "color", "local": "06-wall_color"},
            "answer": gold,
            "semanticStr": "",
            "annotations": {"question": {}, "answer": {}, "fullAnswer": {}},
            "types": {"detailed": "weather", "semantic": "global", "structural": structure},
            "fullAnswer": f"It is {gold}.",
        }
        prompt = official[question_id]["question"] + SHORT_ANSWER
        if row < len(GQA):
            questions.append({"question_id": question_id, "image": f"{image}.jpg", "text": prompt})
        if text is not None:
            answers.append({"question_id": question_id, "prompt": prompt, "text": text})
        write_image(folder / "images" / f"{image}.jpg", row % 4)
    (folder / "testdev_balanced_questions.json").write_text(json.dumps(official))
    write_lines(folder / "llava_gqa_testdev_balanced.jsonl", questions)
    return answers


def write_scienceqa(folder: Path) -> list[dict]:
    """Write the files, with a text-only question among them; returns the answers."""
    problems, converted, answers = {}, [], []
    for row, (num_choices, gold, text, _) in enumerate([*SCIENCEQA, (2, "B", "A", 0)]):
        pid, has_image = str(100 + row), row < len(SCIENCEQA)
        choices = ["the red one", "the blue one", "the green one", "both", "none"][:num_choices]
        problems[pid] = {
            "question": f"Which one, {row}?",
            "choices": choices,
            "answer": "ABCDE".index(gold),
            "hint": "",
            "image": "image.png" if has_image else None,
            "task": "closed choice",
            "grade": "grade2",
            "subject": "natural science",
            "split": "test",
        }
        options = " ".join(f"({letter}) {choice}" for letter, choice in zip("ABCDE", choices, strict=False))
        value = f"Context: N/A\nQuestion: Which one, {row}?\nOptions: {options}"
        entry = {"id": pid, "conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": gold}]}
        if has_image:
            entry["conversations"][0]["value"] += "\n<image>"
            entry["image"] = f"{pid}/image.png"
            write_image(folder / "images" / "test" / pid / "image.png", row)
        converted.append(entry)
        if text is not None:
            answers.append({"question_id": pid, "prompt": "<image>\n" * has_image + value, "text": text})
    (folder / "problems.json").write_text(json.dumps(problems | {"1": {"question": "train only"}}))
    (folder / "pid_splits.json").write_text(json.dumps({"train": ["1"], "val": [], "test": list(problems)}))
    (folder / "llava_test_CQM-A.json").write_text(json.dumps(converted))
    return answers


def write_mme(folder: Path) -> list[dict]:
    """Write the files, one category with images and texts apart, as in the release; returns the answers."""
    release, questions, answers = folder / "MME_Benchmark_release_version", [], []
    for category, images in MME.items():
        is_split = category == "artwork"
        texts = release / category / "questions_answers_YN" if is_split else release / category
        pictures = release / category / "images" if is_split else release / category
        texts.mkdir(parents=True)
        for number, pair in enumerate(images):
            lines = []
            for gold, (text, _) in zip(("Yes", "No"), pair, strict=True):
                # The release has two blanks before the request here and there.
                question = f"Is this {number} a {gold.lower()} case?{' ' * number}"
                lines.append(f"{question} Please answer yes or no.\t{gold}\n")
                prompt = question.strip() + SHORT_ANSWER
                question_id = f"{category}/{number:04d}.png"
                image = (pictures / f"{number:04d}.png").relative_to(release)
                line = {"question_id": question_id, "image": str(image), "text": prompt, "category": category}
                questions.append(line)
                if text is not None:
                    answers.append({"question_id": question_id, "prompt": prompt, "text": text})
            (texts / f"{number:04d}.txt").write_text("".join(lines) + "\n" * number)
            write_image(pictures / f"{number:04d}.png", number)
    write_lines(folder / "llava_mme.jsonl", questions)
    return answers


WRITERS = {"pope": write_pope, "gqa": write_gqa, "scienceqa": write_scienceqa, "mme": write_mme}


def write_benchmark(name: str, folder: Path, seed: int | None = None) -> Path:
    """Write benchmark `name` and the awkward answers to folder/answers.jsonl; `seed` shuffles the answers."""
    folder.mkdir(parents=True)
    answers = WRITERS[name](folder)
    if seed is not None:
        random.Random(seed).shuffle(answers)
    write_lines(folder / "answers.jsonl", answers)
    return folder
