"""MMBench, in English and Chinese, and SEED-Bench in their official formats; answers are edge cases of the rules."""

import base64
import csv
import json
from pathlib import Path

from tests.support.official_files import LETTER_ANSWER, write_image, write_lines

COLOURS = {"mmbench": ("red", "blue", "green", "black"), "mmbench_cn": ("红色", "蓝色", "绿色", "黑色")}
MMBENCH_FILES = {"mmbench": "mmbench_dev_20230712.tsv", "mmbench_cn": "mmbench_dev_cn_20231003.tsv"}

# (number of options, answer, 1 if right by letter or text, 1 if right by letter, 1 if right in the first rotation). An
# answer is the same in all rotations or a tuple with one for each. {letter} stands for the right letter, {lower} for
# the same in lower case, {text} for the words of that option, {wrong} for another letter.
MMBENCH = [
    (4, "{letter}", 1, 1, 1),
    (4, "{letter}.", 1, 1, 1),
    (4, "({letter})", 1, 1, 1),
    (4, "{letter}: {text}", 1, 1, 1),
    (4, "The answer is {letter}", 1, 1, 1),
    (4, "The answer is {letter} because I say so", 0, 0, 0),  # not among the last four words
    (4, "{lower}", 0, 0, 0),
    (4, "{letter}。", 0, 0, 0),
    (4, "（{letter}）", 0, 0, 0),  # noqa: RUF001
    (4, "答案是{letter}", 0, 0, 0),
    (4, "选{letter}", 0, 0, 0),
    (4, "{text}", 1, 0, 1),
    (4, "A or B", 0, 0, 0),
    (4, ("{letter}", "{letter}", "{letter}", "{wrong}"), 0, 0, 1),
    (4, ("{wrong}", "{letter}", "{letter}", "{letter}"), 0, 0, 0),
    (4, ("{letter}", "{letter}", "{letter}", None), 0, 0, 1),
    (4, None, 0, 0, 0),
    (2, "{letter}", 1, 1, 1),
    (3, "{letter}", 1, 1, 1),
    (2, "C", 0, 0, 0),
    (4, "**{letter}**", 1, 1, 1),
    (4, "#{letter}#", 1, 1, 1),
    (4, "{{{letter}}}", 1, 1, 1),
    (4, "{letter}!", 1, 1, 1),
    (4, "{letter};", 1, 1, 1),
    (4, "{letter}\n", 1, 1, 1),
    (4, "", 0, 0, 0),
    (4, "{letter} {letter}", 1, 1, 1),
    (4, "{letter}, definitely", 1, 1, 1),
    (4, "I think it is {letter}", 1, 1, 1),
    (4, "Answer:{letter}", 1, 1, 1),
    (4, "Answer-{letter}", 0, 0, 0),
    (4, "Option {letter} is right, I think so", 0, 0, 0),
    (4, "{letter}/", 0, 0, 0),
    (4, "{letter}{letter}", 0, 0, 0),
    (4, '"{letter}"', 0, 0, 0),
    (4, "{lower}. {text}", 1, 0, 1),
    (3, "{text} or {other_text}", 0, 0, 0),
    (4, "E", 0, 0, 0),
    (3, ("{letter}", "{letter}.", "({letter})"), 1, 1, 1),
    (4, ("{letter}", "{letter}.", "The answer is {letter}", "{letter}, {letter}"), 1, 1, 1),
]

LETTERS = "ABCD"
# (gold, answer, 1 if right, 1 if right by its first character); questions wrong by both rules are of type 4.
SEEDBENCH = [
    *((letter, letter, 1, 1) for letter in LETTERS),
    ("A", "A.", 0, 1),
    ("A", "A. red", 0, 1),
    ("A", " A", 0, 1),
    ("A", "a", 0, 0),
    ("A", "(A)", 0, 0),
    ("A", "B", 0, 0),
    ("A", "", 0, 0),
    ("A", None, 0, 0),
    ("A", "A\n", 0, 1),
    ("A", "AB", 0, 1),
    ("A", "The answer is A", 0, 0),
    ("A", "Answer: B", 0, 1),
    ("D", "Dog", 0, 1),
    *((LETTERS[row % 4], LETTERS[row % 4], 1, 1) for row in range(15)),
    *((LETTERS[row % 4], LETTERS[(row + 1) % 4], 0, 0) for row in range(10)),
]


def write_mmbench(folder: Path, name: str = "mmbench") -> list[dict]:
    """Write the table, one row per rotation; return the answers. Some rows refer to another row's image."""
    rows, answers = [], []
    for number, (num_options, given, *_) in enumerate(MMBENCH):
        write_image(folder / "picture.jpg", number)
        picture = base64.b64encode((folder / "picture.jpg").read_bytes()).decode()
        (folder / "picture.jpg").unlink()
        texts = list(COLOURS[name][:num_options])
        for rotation in range(num_options):
            options = texts[rotation:] + texts[:rotation]
            gold = options.index(texts[number % num_options])
            index = number + 1_000_000 * rotation
            row = {
                "index": index,
                "question": f"Which colour, {number}?",
                "hint": '"A" hint\nof two lines' * (number % 2),
            }
            row |= dict.fromkeys(LETTERS, "") | dict(zip(LETTERS, options, strict=False))
            row |= {"answer": LETTERS[gold], "category": "colours", "source": "drawn"}
            row |= {"image": number if rotation and number % 3 == 0 else picture}
            rows.append(row | {"l2-category": "attributes", "comment": "", "split": "dev"})
            text = given[rotation] if isinstance(given, tuple) else given
            if text is not None:
                words = {"letter": LETTERS[gold], "wrong": LETTERS[gold - 1], "lower": LETTERS[gold].lower()}
                words |= {"text": options[gold], "other_text": options[gold - 1]}
                answers.append({"question_id": index, "prompt": row["question"], "text": text.format(**words)})
    with (folder / MMBENCH_FILES[name]).open("w", newline="", encoding="utf-8") as file:
        order = "index question hint A B C D answer category image source l2-category comment split".split()
        writer = csv.DictWriter(file, order, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return answers


def write_mmbench_cn(folder: Path) -> list[dict]:
    """Write the table with Chinese options; return the answers."""
    return write_mmbench(folder, "mmbench_cn")


def write_seedbench(folder: Path) -> list[dict]:
    """Write the files, with two questions on videos; return the answers, whose ids are numbers."""
    questions, lines, answers = [], [], []
    for row, (gold, text, *verdicts) in enumerate([*SEEDBENCH, ("A", "A", 1, 1), ("B", "C", 1, 1)]):
        is_image = row < len(SEEDBENCH)
        question_id, image = 101669 + row, f"SEED-Bench-image/{row}_{row}"
        choices = dict(zip(("choice_a", "choice_b", "choice_c", "choice_d"), COLOURS["mmbench"], strict=True))
        entry = {"answer": gold, "data_id": f"{row}_{row}", "data_type": "image" if is_image else "video"}
        entry |= {"question": f"Which colour, {row}?", "question_type_id": 1 + row % 3 if any(verdicts) else 4}
        questions.append(entry | choices | {"question_id": f"{question_id:07d}"})
        options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices.values(), strict=True))
        prompt = f"{entry['question']}\n{options}{LETTER_ANSWER}"
        lines.append({"question_id": question_id, "image": f"{image}.jpg", "text": prompt, "category": "Scene"})
        if text is not None:
            answers.append({"question_id": question_id, "prompt": prompt, "text": text})
        write_image(folder / f"{image}.jpg", row % 4)
    types = {"Scene Understanding": 1, "Instance Identity": 2, "Instance Location": 3, "Text Understanding": 4}
    (folder / "SEED-Bench.json").write_text(json.dumps({"questions": questions, "question_type": types}))
    write_lines(folder / "llava-seed-bench.jsonl", lines)
    return answers


MMBENCH_METRICS = {
    "accuracy": 100 * 21 / 41,
    "accuracy_vlmevalkit": 100 * 21 / 41,
    "accuracy_letter": 100 * 19 / 41,
    "accuracy_first_rotation": 100 * 23 / 41,
}
METRICS = {
    "mmbench": MMBENCH_METRICS,
    "mmbench_cn": MMBENCH_METRICS,
    "seedbench": {"accuracy": 100 * 19 / 42, "accuracy_lmms_eval": 100 * 26 / 42},
}
WRITERS = {"mmbench": write_mmbench, "mmbench_cn": write_mmbench_cn, "seedbench": write_seedbench}
