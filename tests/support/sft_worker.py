"""Training of SFTTrainer and DualSpeedSFTTrainer on as many ranks as started this; writes logs and weights."""

import sys
from pathlib import Path

import torch
from trl import SFTTrainer

from dualspeed.cluster.launch import one_of_several
from dualspeed.trl import DualSpeedSFTTrainer
from tests.support.sft import make_sft
from tests.support.stock import logged, weights


def main(kind: str, out: Path) -> None:
    for name, trainer_class in (("stock", SFTTrainer), ("ours", DualSpeedSFTTrainer)):
        trainer = make_sft(trainer_class, out / name, kind, per_device_train_batch_size=1)
        if name == "stock":
            trainer.model.model.vision_model.requires_grad_(False)
        trainer.train()
        if trainer.is_world_process_zero():
            made = {"world": trainer.accelerator.num_processes, "log": logged(trainer), "weights": weights(trainer)}
            torch.save(made, out / f"{name}.pt")


if __name__ == "__main__":
    with one_of_several():
        for each in sys.argv[2:]:
            main(each, Path(sys.argv[1]) / each)
