"""Data folder of the demo: images, captions and conversations to train on, and the benchmarks' files.

Output of `write_demo_data`: images/train/*.png, scenes.json, pretrain.json and finetune.json; for each of the splits
`test` (digits of the test split) and `heldout` (training digits, other scenes) a folder for each benchmark; and
validation.json, conversations about the first held-out scenes, with images in images/train/heldout.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dualspeed.demo.benchmark_files import WRITERS, write_png
from dualspeed.demo.drawing import Scene, draw_scene, sample_scene
from dualspeed.demo.questions import Question, ask_turns, caption
from dualspeed.files import atomic_folder
from dualspeed.settings.demo import SceneSettings

STREAMS = {"train": 0, "finetune": 1, "heldout": 2, "test": 3, "validation": 4}
"""Independent streams of random numbers, so that the size of one part doesn't change the others."""


def write_demo_data(settings: SceneSettings, out: Path) -> None:
    """Write the demo's data to folder `out`, complete or not at all; the same settings give the same bytes."""
    with atomic_folder(out) as folder:
        write_training_data(settings, folder)
        write_validation_data(settings, folder)
        for split in ("heldout", "test"):
            write_benchmarks(settings, split, folder / split)


def make_scenes(settings: SceneSettings, stream: str) -> list[Scene]:
    """Draw the scenes of `train`, `heldout` or `test`."""
    rng = np.random.default_rng([settings.seed, STREAMS[stream]])
    size = settings.num_train_scenes if stream == "train" else settings.num_eval_scenes
    return [sample_scene(rng, "test" if stream == "test" else "train") for _ in range(size)]


def write_training_data(settings: SceneSettings, folder: Path) -> None:
    """Write the training images, their labels (scenes.json), captions and conversations."""
    scenes = make_scenes(settings, "train")
    rng = np.random.default_rng([settings.seed, STREAMS["finetune"]])
    labels, captions, conversations = [], [], []
    for number, scene in enumerate(tqdm(scenes, desc="demo data: training scenes", unit="scene", mininterval=2)):
        image = f"{number:06d}.png"
        write_png(folder / "images" / "train" / image, draw_scene(scene))
        labels.append({"image": image, "items": [[item.cell, item.colour, item.digit] for item in scene.items]})
        captions.append(caption_record(caption(scene, rng), image))
        for part in range(settings.conversations_per_scene):
            turns = ask_turns(scene, rng, settings.turns_per_conversation)
            conversations.append(conversation_record(turns, f"{number:06d}-{part}", image))
    (folder / "scenes.json").write_text(json.dumps(labels))
    (folder / "pretrain.json").write_text(json.dumps(captions))
    (folder / "finetune.json").write_text(json.dumps(conversations))


def write_validation_data(settings: SceneSettings, folder: Path) -> None:
    """Write the images of the first held-out scenes, and one conversation about each."""
    rng = np.random.default_rng([settings.seed, STREAMS["validation"]])
    conversations = []
    for number, scene in enumerate(make_scenes(settings, "heldout")[: settings.num_validation_scenes]):
        image = f"heldout/{number:06d}.png"
        write_png(folder / "images" / "train" / image, draw_scene(scene))
        turns = ask_turns(scene, rng, settings.turns_per_conversation)
        conversations.append(conversation_record(turns, f"heldout-{number:06d}", image))
    (folder / "validation.json").write_text(json.dumps(conversations))


def caption_record(text: str, image: str) -> dict[str, Any]:
    """Return a caption in the format of LLaVA-Pretrain."""
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": text}]
    return {"id": image.removesuffix(".png"), "image": image, "conversations": turns}


def conversation_record(questions: list[Question], record_id: str, image: str) -> dict[str, Any]:
    """Return a conversation in the format of LLaVA-Instruct, with the image before the first question."""
    turns: list[dict[str, str]] = []
    for question in questions:
        mark = "" if turns else "<image>\n"
        turns.append({"from": "human", "value": mark + question.prompt})
        turns.append({"from": "gpt", "value": question.reply})
    return {"id": record_id, "image": image, "conversations": turns}


def write_benchmarks(settings: SceneSettings, split: str, folder: Path) -> None:
    """Write the four benchmarks of an evaluation split."""
    scenes = make_scenes(settings, split)
    for name, write in tqdm(WRITERS.items(), desc=f"demo data: {split} questions", unit="benchmark"):
        rng = np.random.default_rng([settings.seed, STREAMS[split], len(name)])
        write(folder / name, scenes, settings.questions_per_benchmark, rng)
