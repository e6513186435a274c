"""A stock Trainer and a DualSpeedTrainer of the same model, data and arguments; ours with a Baseline's settings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from dualspeed import DualSpeedConfig, DualSpeedTrainer
from tests.support import tiny
from tests.support.batches import collate, sample

BASELINE = DualSpeedConfig(slow_mode_ratio=1, distillation_weight=0)
FAST = DualSpeedConfig(slow_mode_ratio=0, pruning_ratio=0.7)
NUM_STEPS = 4
ADAM_EPSILON = 1e-4
"""Adam divides a gradient by its own size. With the default, 1e-8, the rounding of a tiny gradient moves a weight by a
share of the learning rate, and two ways to the same gradients could not be compared by their weights."""
NOT_LOGITS = ["past_key_values", "cache", "image_hidden_states", "image_outputs"]
"""Outputs of a stock VLM that its trainer would gather as predictions, and fails at in some versions."""
OURS = ("dualspeed", "projector_learning_rate", "vision_learning_rate", "slow_batch_size", "eval_mode")


def rows(num_samples: int = 16) -> Dataset:
    """Samples of which one in three has no image, and one in three has two."""
    return Dataset.from_list([{"seed": seed, "num_images": seed % 3} for seed in range(num_samples)])


def collate_rows(of_batch: list[dict]) -> dict[str, torch.Tensor]:
    return collate([sample("llava", row["seed"], row["num_images"]) for row in of_batch])


def arguments(folder: Path, **given: Any) -> TrainingArguments:
    defaults = {
        "output_dir": str(folder),
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "learning_rate": 1e-2,
        "adam_epsilon": ADAM_EPSILON,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": [],
        "remove_unused_columns": False,
    }
    return TrainingArguments(**(defaults | given))


def make(kind: type, folder: Path, model: Any = None, **given: Any) -> Any:
    """Trainer of class `kind`; `given` are training arguments and arguments of its constructor, by name."""
    names = set(TrainingArguments.__dataclass_fields__)
    own = {name: given.pop(name) for name in list(given) if name not in names}
    if issubclass(kind, DualSpeedTrainer):
        own = {"dualspeed": BASELINE} | own
    else:
        own = {name: value for name, value in own.items() if name not in OURS}
    if "model_init" not in own:
        own["model"] = tiny.llava() if model is None else model
    defaults = {"train_dataset": rows(), "eval_dataset": rows(7), "data_collator": collate_rows}
    return kind(args=arguments(folder, **given), **(defaults | own))


def both(folder: Path, model: Callable[[], Any] = tiny.llava, **given: Any) -> tuple[Trainer, DualSpeedTrainer]:
    """Stock trainer and ours, each with a model of its own."""
    stock = make(Trainer, folder / "stock", None if "model_init" in given else model(), **given)
    return stock, make(DualSpeedTrainer, folder / "ours", None if "model_init" in given else model(), **given)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights of the VLM, by stock names."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return getattr(model, "vlm", model).state_dict()


TIMES = ("runtime", "per_second", "preparation_time")


def logged(trainer: Trainer) -> list[dict[str, float]]:
    """Records of the log without times."""
    return [
        {key: value for key, value in entry.items() if not any(time in key for time in TIMES)}
        for entry in trainer.state.log_history
    ]


def assert_same_logs(stock: Trainer, ours: Trainer, rel: float = 1e-4) -> None:
    """Our log has stock's records in stock's order, with stock's values; further values are ours."""
    import pytest

    expected, found = logged(stock), logged(ours)
    assert len(found) == len(expected), (expected, found)
    for one, other in zip(expected, found, strict=True):
        assert {key: other.get(key) for key in one} == pytest.approx(one, rel=rel, abs=1e-6)


def assert_same_weights(stock: Trainer, ours: Trainer, atol: float = 1e-5) -> None:
    torch.testing.assert_close(weights(ours), weights(stock), atol=atol, rtol=1e-4)


class Recorder(TrainerCallback):
    """Names of the events, in their order."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_"):
            return lambda args, state, control, **kwargs: self.events.append(name)
        return super().__getattribute__(name)
