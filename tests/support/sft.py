"""TRL's SFTTrainer and DualSpeedSFTTrainer of the same tiny model, rows and arguments; ours with Baseline settings."""

from pathlib import Path
from typing import Any

import datasets
from PIL import Image
from trl import SFTConfig, SFTTrainer

from dualspeed.trl import DualSpeedSFTTrainer
from tests.support.stock import ADAM_EPSILON, BASELINE, OURS
from tests.support.tiny_chat import tiny_parts

FAMILY = "idefics3"
ANSWERS = ["red", "two of them", "a blue 7", "no", "yes", "it is green", "left", "7"]


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def rows(kind: str) -> datasets.Dataset:
    """Eight rows with an image each: `messages`, or `prompt` and `completion`."""
    made = []
    for number, answer in enumerate(ANSWERS):
        question, reply = [said("user", f"What is {number}?")], [said("assistant", answer)]
        texts = {"messages": question + reply} if kind == "messages" else {"prompt": question, "completion": reply}
        made.append(texts | {"images": [Image.new("RGB", (28, 28), (30 * number, 0, 90))]})
    return datasets.Dataset.from_list(made)


def arguments(folder: Path, kind: str = "messages", **given: Any) -> SFTConfig:
    defaults = {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "adam_epsilon": ADAM_EPSILON,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_length": None,
        "assistant_only_loss": kind == "messages",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": [],
    }
    return SFTConfig(str(folder), **(defaults | given))


def make_sft(
    trainer: type, folder: Path, kind: str = "messages", model: Any = None, family: str = FAMILY, **given: Any
) -> Any:
    """Trainer of class `trainer` for a family of tiny_chat.

    Args:
        given: fields of SFTConfig and arguments of the trainer's constructor, by name.
    """
    names = set(SFTConfig.__dataclass_fields__)
    own = {name: given.pop(name) for name in list(given) if name not in names}
    if issubclass(trainer, DualSpeedSFTTrainer):
        own = {"dualspeed": BASELINE} | own
    else:
        own = {name: value for name, value in own.items() if name not in OURS}
    made, processor = tiny_parts(family)
    defaults = {"train_dataset": rows(kind), "processing_class": processor}
    model = made if model is None else model(made) if callable(model) and not hasattr(model, "config") else model
    return trainer(model=model, args=arguments(folder, kind, **given), **(defaults | own))


def both_sft(folder: Path, kind: str, **given: Any) -> tuple[SFTTrainer, DualSpeedSFTTrainer]:
    return make_sft(SFTTrainer, folder / "stock", kind, **given), make_sft(
        DualSpeedSFTTrainer, folder / "ours", kind, **given
    )
