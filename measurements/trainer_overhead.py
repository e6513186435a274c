"""Overhead of the trainer: time of a step that is not spent in the model, the optimizer or the data.

    python -m measurements.trainer_overhead [--steps 20]

DualSpeedTrainer with the project's metric log, a record at every step, on the `small` model of models.py.
"""

import argparse
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from dualspeed import DualSpeedConfig, DualSpeedTrainer
from dualspeed.device import machine
from dualspeed.method.model import DualSpeedModel
from dualspeed.tracking.metric_log import MetricLog, RunSpec
from dualspeed.training.callbacks import MetricLogCallback
from dualspeed.training.trainable import set_trainable
from measurements.models import MODELS, batch_of, build
from measurements.stopwatch import Stopwatch

SIZE = MODELS["small"]
WARM_UP = 2


class MeasuredTrainer(DualSpeedTrainer):
    """DualSpeedTrainer whose optimizer is timed from its first step."""

    watch: Stopwatch
    contexts: ExitStack

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Create the optimizer and time its steps."""
        optimizer = super().create_optimizer(model)
        self.contexts.enter_context(self.watch.on("optimizer", optimizer, "step"))
        return optimizer


class StartAfterWarmUp(TrainerCallback):
    """Resets the stopwatch after the warm-up steps, and measures the total time of the steps that count."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == WARM_UP:
            self.watch.seconds.clear()
            self.started = time.perf_counter()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.total = time.perf_counter() - self.started


def main() -> None:
    """Print the seconds of a step by part."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(Path(folder), options.steps)
    total = seconds["whole step"]
    table = pd.DataFrame(
        {"s a step": seconds, "share": {part: f"{value / total:.2%}" for part, value in seconds.items()}}
    )
    print(f"small on {machine()}, torch {torch.__version__}, {options.threads} threads, mean of {options.steps} steps")
    print(table.to_markdown(floatfmt=".4f"))


def measure(folder: Path, steps: int) -> dict[str, float]:
    """Mean seconds of a step by part."""
    watch = Stopwatch()
    after_warm_up = StartAfterWarmUp(watch)
    with ExitStack() as contexts, MetricLog(folder, None, RunSpec(name="overhead")) as metric_log:
        trainer = make_trainer(folder, steps + WARM_UP)
        trainer.watch, trainer.contexts = watch, contexts
        trainer.add_callback(MetricLogCallback(metric_log))
        trainer.add_callback(after_warm_up)
        for part, owner, name in (
            ("model", DualSpeedModel, "forward"),
            ("model", torch.Tensor, "backward"),
            ("optimizer", trainer.accelerator, "clip_grad_norm_"),
            ("optimizer", DualSpeedModel, "zero_grad"),
            ("data", trainer, "data_collator"),
        ):
            contexts.enter_context(watch.on(part, owner, name))
        trainer.train()
    parts = {name: value / steps for name, value in watch.seconds.items()}
    total = after_warm_up.total / steps
    return parts | {"trainer": total - sum(parts.values()), "whole step": total}


def make_trainer(folder: Path, steps: int) -> MeasuredTrainer:
    """Make a trainer of fast and slow steps that repeats one batch."""
    model = DualSpeedModel(build(SIZE), DualSpeedConfig())
    set_trainable(model, "finetune")
    batch = batch_of(SIZE)
    rows = [{name: values[i] for name, values in batch.items()} for i in range(SIZE.batch_size)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=SIZE.batch_size,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model.activation_checkpointing_enable()
    return MeasuredTrainer(
        model, arguments, train_dataset=rows, data_collator=collate, slow_batch_size=SIZE.slow_batch_size
    )


def collate(rows: list[dict[str, Tensor]]) -> dict:
    """Batch of rows with one image each."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]} | {"num_images": [1] * len(rows)}


if __name__ == "__main__":
    main()
