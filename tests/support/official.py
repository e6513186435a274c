"""Small benchmarks in the exact official formats, with answers that show the oddities of the official rules.

The verdicts in the tables below are computed by hand; an answer of None is missing.
"""

import json
import random
from pathlib import Path

from tests.support import official_choice, official_vqa
from tests.support.official_files import SHORT_ANSWER, write_image, write_lines

OBJECTS = ("snowboard", "car", "person", "dining table", "backpack", "chair")

# {split: (label, answer, its reading)}: yes unless No, no or not is a word of the first sentence.
POPE = {
    "random": [
        ("yes", "Yes", "yes"),
        ("yes", "NO", "yes"),
        ("yes", "Yes, there is no doubt", "no"),
        ("no", "no", "no"),
        ("no", "Nope", "yes"),
        ("no", "No.", "no"),
        ("yes", "Yes.", "yes"),
        ("yes", "yes, it is", "yes"),
        ("yes", "no", "no"),
        ("yes", "not", "no"),
        ("yes", "The answer is yes. No doubt.", "yes"),
        ("no", "no way", "no"),
        ("no", "There are none.", "yes"),
        ("no", "not really", "no"),
        ("no", "NO.", "yes"),
        ("no", "I do not see it", "no"),
        ("no", "yes", "yes"),
        ("no", "No\n", "yes"),
        ("no", "Cannot tell", "yes"),
        ("no", "nothing, no", "no"),
    ],
    "popular": [
        ("yes", "", "yes"),
        ("no", "no!", "yes"),
        ("yes", None, "no"),
        ("no", None, "yes"),
        ("yes", "Yes", "yes"),
        ("yes", "Yeah", "yes"),
        ("no", "no", "no"),
        ("no", "No, sir", "no"),
        ("yes", "no.", "no"),
        ("no", ".", "yes"),
        ("no", "  no", "no"),
        ("yes", "no-one", "yes"),
    ],
    "adversarial": [
        ("yes", "Yes. No other", "yes"),
        ("no", "There is not one.", "no"),
        ("yes", "Not sure", "yes"),
        ("no", "No, there isn't", "no"),
        ("yes", "yes", "yes"),
        ("no", "no", "no"),
        ("yes", "YES", "yes"),
        ("no", "It is not", "no"),
        ("no", "No . ", "no"),
        ("yes", "not,yes", "yes"),
        ("no", "no,yes", "yes"),
        ("no", "Nobody", "yes"),
    ],
}
POPE_METRICS = {
    "f1": 100 * (10 / 19 + 8 / 13 + 10 / 12) / 3,
    "f1_random": 100 * 10 / 19,  # 5 true positives, 6 false positives, 3 false negatives
    "accuracy_random": 100 * 11 / 20,
    "precision_random": 100 * 5 / 11,
    "recall_random": 100 * 5 / 8,
    "yes_ratio_random": 100 * 11 / 20,
    "f1_popular": 100 * 8 / 13,  # 4 true positives, 3 false positives, 2 false negatives
    "accuracy_popular": 100 * 7 / 12,
    "yes_ratio_popular": 100 * 7 / 12,
    "f1_adversarial": 100 * 10 / 12,  # 5 true positives, 2 false positives
    "f1_lmms_eval": 100 * 8 / 11,  # strictly yes or no: 4 true positives, 1 false positive, 2 false negatives
}

# (structural type, gold, answer, 1 if right): only trailing periods and case are ignored.
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
    ("query", "blue", "blue", 1),
    ("query", "blue", "Blue", 1),
    ("query", "blue", "blue!", 0),
    ("query", "blue", "(blue)", 0),
    ("query", "blue", "blue..", 1),
    ("query", "blue", ".blue", 0),
    ("query", "blue", "blue\n", 0),
    ("query", "t-shirt", "T-shirt", 1),
    ("query", "t-shirt", "tshirt", 0),
    ("query", "men", "man", 0),
    ("query", "dining table", "Dining Table.", 1),
    ("query", "dining table", "dining  table", 0),
    ("query", "5", "5", 1),
    ("query", "5", "five", 0),
    ("query", "person's", "persons", 0),
    ("query", "right", "right side", 0),
    ("verify", "yes", "yes.", 1),
    ("verify", "yes", "Yes, it is", 0),
    ("verify", "no", "No", 1),
    ("verify", "no", "NO!", 0),
    ("verify", "no", "yes", 0),
    ("verify", "no", "n", 0),
    ("logical", "yes", "yes ", 0),
    ("logical", "yes", "YES", 1),
    ("logical", "no", "no..", 1),
    ("choose", "left", "left", 1),
    ("choose", "left", "to the left", 0),
    ("choose", "traffic light", "trafficlight", 0),
    ("compare", "yes", "yes?", 0),
    ("compare", "no", "no", 1),
]
GQA_METRICS = {
    "accuracy": 100 * 17 / 42,
    "accuracy_open": 100 * 9 / 24,
    "accuracy_binary": 100 * 8 / 18,
    "accuracy_lmms_eval": 100 * 25 / 42,  # compared in lower case without punctuation
}

# (number of choices, gold, answer, 1 if right): read are a letter, "X. ", and one "The answer is X" with a character.
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
    (2, "A", "A", 1),
    (2, "B", "B", 1),
    (2, "A", "B", 0),
    (2, "B", "A. the red one", 0),
    (2, "A", "A.  the red one", 1),
    (2, "A", "A.the red one", 0),
    (4, "D", "D", 1),
    (4, "D", "D\n", 0),
    (4, "D", "The answer is D. ", 1),
    (4, "D", "the answer is D.", 0),
    (4, "D", "Answer: The answer is D!", 1),
    (4, "C", "The answer is C\n", 0),
    (4, "C", "C) the green one", 0),
    (4, "C", "C: the green one", 0),
    (4, "C", "C", 1),
    (4, "C", "D", 0),
    (4, "B", "b. the blue one", 0),
    (4, "B", "Option B", 0),
    (4, "B", "B. ", 1),
    (4, "B", "B . the blue one", 0),
    (5, "E", "E. none", 1),
    (5, "E", "F", 0),
    (5, "D", "The answer is D, not The answer is E.", 0),
    (3, "A", "The answer is A B", 1),
    (3, "A", "", 0),
    (3, "B", "The answer is (B).", 0),
    (3, "C", None, 0),
]
SCIENCEQA_METRICS = {
    "accuracy": 100 * 15 / 39,
    "accuracy_missing_wrong": 100 * 15 / 41,
    "num_answered": 39.0,
    "accuracy_lmms_eval": 100 * 12 / 41,  # a letter that stands alone or before a period
}

# {category: per image (answer to the yes question, 1 if right), (answer to the no question, 1 if right)}.
MME = {
    "artwork": [(("Yes.", 1), ("No.", 1)), (("eyes", 1), ("know", 1))],
    "existence": [(("Snow", 0), ("NO", 1)), (("The answer is yes", 0), ("**No**", 1)), (("**Yes**", 0), (None, 0))],
    "code_reasoning": [((" yes", 1), ("yes", 0)), (("", 0), ("not", 1))],
    "count": [
        (("Yes", 1), ("No", 1)),
        (("yes, two", 1), ("No.", 1)),
        (("YES!", 1), ("yes", 0)),
        (("y", 0), ("n", 0)),
        (("Yep", 0), ("Nope", 1)),
    ],
    "color": [(("Yes it is red", 1), ("not red", 1)), (("I know: yes", 0), ("no", 1))],
    "OCR": [(("yes", 1), ("no", 1)), (("\nyes", 1), (" no", 1)), (('"Yes"', 1), ("No yes", 1))],
    "numerical_calculation": [
        (("Yes.", 1), ("No.", 1)),
        (("Correct", 0), ("Incorrect", 0)),
        (("yes", 1), ("Noyes", 1)),
    ],
    "scene": [(("**No**", 0), ("no", 1))],
}
PERCEPTION = 200 + 100 * 2 / 6 + (60 + 40) + (75 + 50) + 200 + 50
MME_METRICS = {
    "perception": PERCEPTION,
    "cognition": 50 + 100 * (4 / 6 + 2 / 3),
    "acc": 100 * 28 / 42,
    "acc_plus": 100 * 10 / 21,
    "points_artwork": 200.0,
    "points_existence": 100 * 2 / 6,
    "points_code_reasoning": 50.0,
    "points_count": 100.0,
    "perception_lmms_eval": PERCEPTION + 40,  # y and n are read too
    "cognition_lmms_eval": 50 + 100 * (4 / 6 + 2 / 3),
}
METRICS = {"pope": POPE_METRICS, "gqa": GQA_METRICS, "scienceqa": SCIENCEQA_METRICS, "mme": MME_METRICS}
METRICS |= official_vqa.METRICS | official_choice.METRICS
NUM_QUESTIONS = {"pope": 44, "gqa": 42, "scienceqa": 41, "mme": 42, "vqav2": 45, "vizwiz": 42, "textvqa": 42}
NUM_QUESTIONS |= {"mmbench": 41, "mmbench_cn": 41, "seedbench": 42}
NUM_MISSING = {"pope": 2, "gqa": 1, "scienceqa": 2, "mme": 1, "vqav2": 1, "vizwiz": 1, "textvqa": 2}
NUM_MISSING |= {"mmbench": 2, "mmbench_cn": 2, "seedbench": 1}


def write_pope(folder: Path, limit: int | None = None) -> list[dict]:
    """Write the files; return the answers."""
    questions, answers = [], []
    for split, rows in POPE.items():
        labels = []
        for row, (label, text, _) in enumerate(rows[:limit]):
            image, question_id = f"COCO_val2014_{row:012d}.jpg", len(questions) + 1
            question = f"Is there a {OBJECTS[row % len(OBJECTS)]} in the image?"
            labels.append({"question_id": row + 1, "image": image, "text": question, "label": label})
            prompt = question + SHORT_ANSWER
            questions.append({"question_id": question_id, "image": image, "text": prompt, "category": split})
            if text is not None:
                answers.append({"question_id": question_id, "prompt": prompt, "text": text})
            write_image(folder / "images" / image, row)
        write_lines(folder / f"coco_pope_{split}.json", labels)
    write_lines(folder / "llava_pope_test.jsonl", questions)
    return answers


def write_gqa(folder: Path, limit: int | None = None) -> list[dict]:
    """Write the files, with one question that is not balanced and so not scored; return the answers."""
    official, questions, answers, rows = {}, [], [], GQA[:limit]
    for row, (structure, gold, text, _) in enumerate([*rows, ("query", "red", "red", 1)]):
        question_id, image = str(201307250 + row), f"n{row % 4}"
        official[question_id] = {
            "semantic": [],
            "entailed": [question_id],
            "equivalent": [question_id],
            "question": f"What is it, {row}?",
            "imageId": image,
            "isBalanced": row < len(rows),
            "groups": {"global": "color", "local": "06-wall_color"},
            "answer": gold,
            "semanticStr": "",
            "annotations": {"question": {}, "answer": {}, "fullAnswer": {}},
            "types": {"detailed": "weather", "semantic": "global", "structural": structure},
            "fullAnswer": f"It is {gold}.",
        }
        prompt = official[question_id]["question"] + SHORT_ANSWER
        if row < len(rows):
            questions.append({"question_id": question_id, "image": f"{image}.jpg", "text": prompt})
        if text is not None:
            answers.append({"question_id": question_id, "prompt": prompt, "text": text})
        write_image(folder / "images" / f"{image}.jpg", row % 4)
    (folder / "testdev_balanced_questions.json").write_text(json.dumps(official))
    write_lines(folder / "llava_gqa_testdev_balanced.jsonl", questions)
    return answers


def write_scienceqa(folder: Path, limit: int | None = None) -> list[dict]:
    """Write the files, with one text-only question; return the answers."""
    problems, converted, answers, rows = {}, [], [], SCIENCEQA[:limit]
    for row, (num_choices, gold, text, _) in enumerate([*rows, (2, "B", "A", 0)]):
        pid, has_image = str(100 + row), row < len(rows)
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


def write_mme(folder: Path, limit: int | None = None) -> list[dict]:
    """Write the files, one category with images and texts in two folders, as in the release; return the answers."""
    release, questions, answers = folder / "MME_Benchmark_release_version", [], []
    for category, images in MME.items():
        is_split = category == "artwork"
        texts = release / category / "questions_answers_YN" if is_split else release / category
        pictures = release / category / "images" if is_split else release / category
        texts.mkdir(parents=True)
        for number, pair in enumerate(images[:limit]):
            lines = []
            for gold, (text, _) in zip(("Yes", "No"), pair, strict=True):
                # Some questions of the release have two spaces before the request.
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
WRITERS |= official_vqa.WRITERS | official_choice.WRITERS


def write_benchmark(name: str, folder: Path, seed: int | None = None, limit: int | None = None) -> Path:
    """Write the files of benchmark `name`, and its answers to folder/answers.jsonl.

    `seed` shuffles the answers; `limit` takes the first rows of each split of POPE, of GQA, ScienceQA, and each
    category of MME.
    """
    folder.mkdir(parents=True)
    answers = WRITERS[name](folder) if limit is None else WRITERS[name](folder, limit)
    if seed is not None:
        random.Random(seed).shuffle(answers)
    write_lines(folder / "answers.jsonl", answers)
    return folder
