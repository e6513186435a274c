"""Trainings on two ranks that tests/training/test_promises_on_two_ranks.py compares: the stock Trainer's and ours.

Each rank writes what it saw to `record-<rank>.pt`.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.distributed.tensor import DTensor
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

from dualspeed import DualSpeedConfig, DualSpeedTrainer
from dualspeed.cluster.launch import one_of_several
from tests.support import tiny
from tests.support.batches import collate
from tests.support.distributed_worker import uneven_sample
from tests.support.stock import BASELINE, FAST, NOT_LOGITS, logged, make, weights

MIXED = DualSpeedConfig(slow_mode_ratio=0.5, mode_schedule="stratified", pruning_ratio=0.7)
# Each sample has an image: stock gives the projector no gradient without one, ours gives it zeros.
ROWS = Dataset.from_list([{"seed": seed, "num_images": 1 + seed % 2, "length": seed % 5} for seed in range(16)])
ONE_IMAGE = Dataset.from_list([{"seed": seed, "num_images": 1, "length": seed % 3} for seed in range(7)])
WITH_AND_WITHOUT = Dataset.from_list([{"seed": seed, "num_images": int(seed % 4 < 2)} for seed in range(16)])


def collate_uneven(of_batch: list[dict]) -> dict[str, torch.Tensor]:
    """Batch in which the ranks have different numbers of supervised tokens."""
    return collate([uneven_sample("llava", row["seed"], row["num_images"]) for row in of_batch])


SHARED = {
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "train_dataset": ROWS,
    "data_collator": collate_uneven,
}
FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}


class Stream(IterableDataset):
    """Samples with one image, which the stock Trainer can cut up too."""

    def __iter__(self):
        return iter([{"seed": seed, "num_images": 1} for seed in range(16)])


class Snapshots(TrainerCallback):
    """Whole weights at each step that is saved."""

    def __init__(self) -> None:
        self.taken: dict[int, dict[str, torch.Tensor]] = {}
        self.trainer: Any = None

    def on_save(self, args, state, control, **kwargs) -> None:
        self.taken[state.global_step] = whole(self.trainer)


def whole(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Whole weights, gathered from all ranks."""
    values = {name.removeprefix("module."): value for name, value in trainer.model.state_dict().items()}
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).clone() for name, value in values.items()
    }


def both(folder: Path, name: str, observe: Callable[[Trainer], Any], **given: Any) -> dict[str, Any]:
    """Observations of the stock Trainer and of ours, at a Baseline's settings and in both modes."""
    kinds = {"stock": (Trainer, BASELINE), "ours": (DualSpeedTrainer, BASELINE), "mixed": (DualSpeedTrainer, MIXED)}
    return {
        label: observe(make(kind, folder / f"{name}-{label}", dualspeed=settings, **(SHARED | given)))
        for label, (kind, settings) in kinds.items()
    }


def trained(trainer: Trainer) -> dict[str, Any]:
    trainer.train()
    return {
        "logs": logged(trainer),
        "weights": weights(trainer),
        "distributed_type": trainer.accelerator.distributed_type.value,
        "dispatches": trainer.args.accelerator_config.dispatch_batches,
    }


def predicted(trainer: Trainer) -> dict[str, Any]:
    """Predictions that `compute_metrics` gets, the metrics, and those of `predict`."""
    seen = []
    trainer.compute_metrics = lambda found: seen.append((found.predictions, found.label_ids)) or {"rows": len(seen)}
    metrics = trainer.evaluate(ignore_keys=NOT_LOGITS)
    further = trainer.predict(ONE_IMAGE, ignore_keys=NOT_LOGITS)
    arrays = [*seen[0], further.predictions, further.label_ids]
    return {"loss": metrics["eval_loss"], "arrays": [torch.from_numpy(values) for values in arrays]}


def with_trained_tower(folder: Path) -> dict[str, Any]:
    """Training of the tower too, on batches of which some have no image on one rank or on both."""
    trainer = make(
        DualSpeedTrainer,
        folder,
        tiny.llava(),
        dualspeed=MIXED,
        vision_learning_rate=1e-2,
        **SHARED | {"train_dataset": WITH_AND_WITHOUT, "train_sampling_strategy": "sequential"},
    )
    before = whole(trainer)
    trainer.train()
    after = whole(trainer)
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    changed = {name for name, values in after.items() if not torch.equal(values, before[name])}
    return {"weights": after, "changed": changed, "trainable": {name.removeprefix("module.") for name in trainable}}


def with_best_model(folder: Path, **given: Any) -> dict[str, Any]:
    """Training that ends with the weights of its best step, which is not the last."""
    snapshots = Snapshots()
    trainer = make(
        DualSpeedTrainer,
        folder,
        dualspeed=dataclasses.replace(FAST, num_virtual_tokens=2),
        callbacks=[snapshots],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        greater_is_better=True,
        **SHARED | given,
    )
    snapshots.trainer = trainer
    trainer.train()
    return {
        "best": trainer.state.best_global_step,
        "steps": snapshots.taken,
        "weights": whole(trainer),
        "sharded": {isinstance(parameter, DTensor) for parameter in trainer.model.parameters()},
        "distributed_type": trainer.accelerator.distributed_type.value,
        "losses": {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry},
        "again": trainer.evaluate()["eval_loss"],
    }


def main(kind: str, folder: Path) -> None:
    if kind == "fsdp":
        record = {"best": with_best_model(folder / "best", **FSDP)}
    else:
        record = {
            "training": both(folder, "training", trained),
            "accumulated": both(folder, "accumulated", trained, gradient_accumulation_steps=2, max_steps=2),
            "by ranks": both(folder, "by ranks", trained, average_tokens_across_devices=False),
            "stream": both(folder, "stream", trained, train_dataset=Stream()),
            "predictions": both(folder, "predictions", predicted, eval_dataset=ONE_IMAGE),
            "tower": with_trained_tower(folder / "tower"),
            "best": with_best_model(folder / "best"),
        }
    torch.save(record, folder / f"record-{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    with one_of_several():
        main(sys.argv[1], Path(sys.argv[2]))
