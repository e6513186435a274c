"""Evaluation questions of the demo in the official file formats of POPE, GQA, ScienceQA and MME.

Each writer takes the folder, the split's scenes, the number of questions and a random generator. Images are written to
the place where their benchmark expects them.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dualspeed.demo.drawing import Scene, draw_scene
from dualspeed.demo.questions import (
    MME_CATEGORIES,
    NEGATIVES,
    SHORT_ANSWER,
    ask_choice,
    ask_colour,
    ask_digit,
    ask_existence,
    ask_statement,
    choice_text,
)
from dualspeed.files import write_json


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Write JSON lines, one object each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_png(path: Path, image: Image.Image) -> None:
    """Write an image, with little compression: noise compresses badly, and more would only take time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, compress_level=1)


def write_pope(folder: Path, scenes: list[Scene], num_questions: int, rng: np.random.Generator) -> None:
    """Write POPE: questions about existence in three files that differ in their negatives; yes and no alternate."""
    questions: list[dict[str, Any]] = []
    for split, negative in enumerate(NEGATIVES):
        records = []
        for index in range(len(range(split, num_questions, len(NEGATIVES)))):
            number = index % len(scenes)
            question = ask_existence(scenes[number], rng, index % 2 == 0, negative)
            image = f"{number:06d}.png"
            records.append({"question_id": index + 1, "image": image, "text": question.text, "label": question.answer})
            questions.append(
                {
                    "question_id": split * 1_000_000 + index + 1,
                    "image": image,
                    "text": question.prompt,
                    "category": negative,
                }
            )
        write_lines(folder / f"coco_pope_{negative}.json", records)
    write_lines(folder / "llava_pope_test.jsonl", questions)
    for name in sorted({question["image"] for question in questions}):
        write_png(folder / "images" / name, draw_scene(scenes[int(name.removesuffix(".png"))]))


def write_gqa(folder: Path, scenes: list[Scene], num_questions: int, rng: np.random.Generator) -> None:
    """Write GQA: the colour of a digit and the digit of a colour, alternating."""
    annotations, questions = {}, []
    for index in range(num_questions):
        number = index % len(scenes)
        question = (ask_colour if index // len(scenes) % 2 == index % 2 else ask_digit)(scenes[number], rng)
        question_id, image = f"{20_000_000 + index}", f"n{number}"
        annotations[question_id] = {
            "imageId": image,
            "question": question.text,
            "answer": question.answer,
            "fullAnswer": question.answer,
            "isBalanced": True,
            "types": {"structural": "query", "semantic": "attr", "detailed": question.kind},
            "groups": {"global": question.kind, "local": f"{question.kind}-{question.text}"},
            "semantic": [],
            "semanticStr": "",
        }
        questions.append(
            {"question_id": question_id, "image": f"{image}.png", "text": question.prompt, "category": "default"}
        )
    write_json(folder / "testdev_balanced_questions.json", annotations)
    write_lines(folder / "llava_gqa_testdev_balanced.jsonl", questions)
    for number in range(min(len(scenes), num_questions)):
        write_png(folder / "images" / f"n{number}.png", draw_scene(scenes[number]))


def write_scienceqa(folder: Path, scenes: list[Scene], num_questions: int, rng: np.random.Generator) -> None:
    """Write ScienceQA: multiple choice; every problem has an image, and none has a hint."""
    problems, conversations = {}, []
    for index in range(num_questions):
        scene, problem_id = scenes[index % len(scenes)], str(index + 1)
        question = ask_choice(scene, rng)
        problems[problem_id] = {
            "question": question.text,
            "choices": list(question.choices),
            "answer": question.choices.index(question.answer),
            "hint": "",
            "image": "image.png",
            "task": "closed choice",
            "grade": "grade1",
            "subject": "natural science",
            "topic": "digits",
            "category": "digits",
            "skill": "look up a digit or a colour",
            "lecture": "",
            "solution": "",
            "split": "test",
        }
        human = {"from": "human", "value": f"{choice_text(question)}\n<image>"}
        conversations.append(
            {
                "id": problem_id,
                "image": f"{problem_id}/image.png",
                "conversations": [human, {"from": "gpt", "value": f"The answer is {question.reply}."}],
            }
        )
        write_png(folder / "images" / "test" / problem_id / "image.png", draw_scene(scene))
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", {"train": [], "val": [], "test": list(problems)})
    write_json(folder / "llava_test_CQM-A.json", conversations)


def write_mme(folder: Path, scenes: list[Scene], num_questions: int, rng: np.random.Generator) -> None:
    """Write MME: one true and one false statement about each image; an image belongs to one category."""
    release, questions = folder / "MME_Benchmark_release_version", []
    for index in range(num_questions // 2):
        scene, category = scenes[index % len(scenes)], MME_CATEGORIES[index % len(MME_CATEGORIES)]
        name, lines = f"{index:012d}", []
        for answer in (True, False):
            text = ask_statement(scene, rng, category, answer).text
            lines.append(f"{text} Please answer yes or no.\t{'Yes' if answer else 'No'}\n")
            questions.append(
                {
                    "question_id": f"{category}/{name}.png",
                    "image": f"{category}/{name}.png",
                    "text": f"{text}\n{SHORT_ANSWER}",
                    "category": category,
                }
            )
        write_png(release / category / f"{name}.png", draw_scene(scene))
        (release / category / f"{name}.txt").write_text("".join(lines))
    write_lines(folder / "llava_mme.jsonl", questions)


WRITERS = {"pope": write_pope, "gqa": write_gqa, "scienceqa": write_scienceqa, "mme": write_mme}
"""Benchmark -> function that writes its files."""
