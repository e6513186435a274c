"""The README's first example on a tiny model, with rows that stand in for the dataset."""

import datasets
from PIL import Image

from dualspeed import DualSpeedTrainer
from tests.support.readme import FIRST
from tests.support.tiny_chat import tiny_chat

ANSWERS = ["red", "two of them", "a blue 7", "no"]


def the_cauldron() -> datasets.Dataset:
    """Four rows in the form of HuggingFaceM4/the_cauldron, one with two images and two pairs of turns."""
    rows = []
    for number, answer in enumerate(ANSWERS):
        images = [Image.new("RGB", (40, 28 + 4 * number), (60 * number, 0, 90))] * (1 + (number == 1))
        texts = [{"user": f"What is in picture {number}?", "assistant": answer, "source": "made"}]
        texts += [{"user": "Sure?", "assistant": "yes", "source": "made"}] * (number == 1)
        rows.append({"images": images, "texts": texts})
    texts = [
        {"user": datasets.Value("string"), "assistant": datasets.Value("string"), "source": datasets.Value("string")}
    ]
    features = datasets.Features({"images": datasets.List(datasets.Image()), "texts": datasets.List(texts[0])})
    return datasets.Dataset.from_list(rows, features=features)


def run(tmp_path, monkeypatch, name: str) -> DualSpeedTrainer:
    """Trainer after the README's lines, in a folder with the tiny model `base`."""
    tiny_chat(name, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, split: the_cauldron())
    names: dict = {}
    code = FIRST.replace("Qwen/Qwen3-VL-2B-Instruct", "base").replace(
        "learning_rate=1e-5", "learning_rate=1e-2, lr_scheduler_type='constant', max_steps=20"
    )
    assert code.count("base") == code.count("max_steps") == 1
    exec(
        code.replace(
            'TrainingArguments("out",', 'TrainingArguments("out", logging_steps=1, use_cpu=True, report_to=[],'
        ),
        names,
    )
    return names["trainer"]
