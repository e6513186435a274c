"""Training that tests/training/test_distributed.py runs in one process, in two with DDP, and in two with FSDP2.

Eight steps, each kind of batch in both modes: images on both ranks, no image, images on the first rank only, and
samples with and without images. With two more arguments, budgets of tokens divide the steps. Writes losses, modes,
the first rank's gradients and the final checkpoint.
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from torch.distributed.tensor import DTensor
from transformers import AutoModelForImageTextToText, TrainerCallback, TrainingArguments

from dualspeed import DualSpeedConfig, DualSpeedTrainer
from dualspeed.cluster.launch import one_of_several
from dualspeed.training.validation import count_answers, mean_of_answers
from tests.support import tiny
from tests.support.batches import collate, sample

# Images of each of the four samples of a step; with two processes, each takes two samples.
COMPOSITIONS = [(1, 2, 1, 1), (0, 0, 0, 0), (1, 1, 0, 0), (1, 0, 0, 2)]
NUM_STEPS = 2 * len(COMPOSITIONS)


class GradientRecorder(TrainerCallback):
    """Records the gradients of each step before the optimizer applies them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        gradients = {}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                grad = parameter.grad
                whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
                gradients[name.removeprefix("module.")] = whole.clone()
        self.steps.append(gradients)


def uneven_sample(family: str, seed: int, num_images: int) -> dict:
    """A sample of which fewer tokens are supervised on the second rank than on the first."""
    made = sample(family, seed, num_images)
    unsupervised = len(made["labels"]) - 5 + seed % 4
    return made | {"labels": [-100] * unsupervised + made["labels"][unsupervised:]}


class CountingTrainer(DualSpeedTrainer):
    """Counts the micro-batches of each step on this rank."""

    counts = [0] * NUM_STEPS

    def compute_loss(self, model, *args, **kwargs):
        """Loss, as ever."""
        if model.training:
            self.counts[self.state.global_step] += 1
        return super().compute_loss(model, *args, **kwargs)


def main(family: str, base: str, out: str, kind: str, fast: str = "", slow: str = "") -> None:
    num_images = [count for composition in COMPOSITIONS for _ in range(2) for count in composition]
    dataset = Dataset.from_list([{"seed": seed, "num_images": count} for seed, count in enumerate(num_images)])
    fsdp = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    model = AutoModelForImageTextToText.from_pretrained(base)
    trainer = CountingTrainer(
        model=tiny.frozen_tower(model),
        args=TrainingArguments(
            output_dir=f"{out}/checkpoints",
            max_steps=NUM_STEPS,
            per_device_train_batch_size=4 if kind == "single" else 2,
            per_device_eval_batch_size=2,
            train_sampling_strategy="sequential",
            optim="sgd",
            learning_rate=0.1,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            **(fsdp if kind == "fsdp" else {}),
        ),
        dualspeed=DualSpeedConfig(slow_steps=NUM_STEPS // 2, pruning_ratio=0.7),
        train_dataset=dataset,
        eval_dataset=dataset.select(range(5)),  # odd, so that two processes get different numbers
        preprocess_logits_for_metrics=count_answers,
        compute_metrics=mean_of_answers,
        data_collator=lambda rows: (
            collate([uneven_sample(family, row["seed"], row["num_images"]) for row in rows])
            | {"num_images": [row["num_images"] for row in rows]}
        ),
        **({"tokens_per_batch": int(fast), "slow_tokens_per_batch": int(slow)} if fast else {}),
    )
    recorder = GradientRecorder()
    trainer.add_callback(recorder)
    trainer.train()
    is_sharded = {isinstance(parameter, DTensor) for parameter in trainer.model.parameters()}
    counts = trainer.accelerator.gather(torch.tensor([trainer.counts]))
    trainer.save_model(f"{out}/saved")
    validation = trainer.evaluate()
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        modes = [str(trainer.mode_of_step(step)) for step in range(NUM_STEPS)]
        record = {"losses": losses, "modes": modes, "gradients": recorder.steps}
        record["validation"] = [validation["eval_answer_accuracy"], validation["eval_ce_loss"]]
        record["logs"] = trainer.state.log_history
        record["distributed_type"] = trainer.accelerator.distributed_type.value
        record["sharded"], record["micro_batches"] = is_sharded, counts.tolist()
        record["find_unused_parameters"] = trainer.args.ddp_find_unused_parameters
        torch.save(record, Path(out) / "record.pt")


if __name__ == "__main__":
    with one_of_several():
        main(*sys.argv[1:])
