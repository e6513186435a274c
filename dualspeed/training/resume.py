"""Checkpoints to resume from: whole or absent, and only the last two are kept.

A checkpoint is written into the folder `.unfinished` and moved out of it when every process has written its part.
Beside the trainer's own files it has `progress.json`: the seconds that the stage has taken so far, and the number of
processes and the strategy of sharding that it runs with.
"""

import os
import shutil
import signal
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dualspeed.files import write_json
from dualspeed.training.state import PROGRESS, list_checkpoints
from dualspeed.training.trainer import DualSpeedTrainer

UNFINISHED = ".unfinished"
NUM_KEPT = 2


class EndsAtLastStep(DualSpeedTrainer):
    """DualSpeedTrainer that trains no step more when it is resumed from the last one's checkpoint."""

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # The stock loop checks for the last step after a step: resumed behind the last one, it would train one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)


class ResumableTrainer(EndsAtLastStep):
    """DualSpeedTrainer that is resumed after a kill; `args.output_dir` is `unfinished_folder(checkpoints)`."""

    predicts_supervised_only = True  # validation counts answers, whose logits are a tenth of all

    def __init__(self, *args: Any, started: float, **kwargs: Any) -> None:
        """Set up training.

        Args:
            args, kwargs: as for DualSpeedTrainer.
            started: `time.monotonic()` at the start of the stage, as if nothing had interrupted it.
        """
        self._started = started
        super().__init__(*args, **kwargs)
        if self.is_world_process_zero():
            shutil.rmtree(self.args.output_dir, ignore_errors=True)
        self.add_callback(KeepWholeCheckpoints(self))

    def seconds(self) -> float:
        """Wall clock of the stage so far, over all its jobs, without its validations."""
        return time.monotonic() - self._started - self.evaluation_seconds

    def get_train_dataloader(self) -> DataLoader:
        """Stock data loader, with workers that ignore SIGTERM from outside."""
        return shield_workers(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """Stock data loader, with workers that ignore SIGTERM from outside."""
        return shield_workers(super().get_eval_dataloader(eval_dataset))


def unfinished_folder(checkpoints: Path) -> Path:
    """Folder below that of the checkpoints which the trainer writes a checkpoint into."""
    return checkpoints / UNFINISHED


class KeepWholeCheckpoints(TrainerCallback):
    """Moves each written checkpoint from `.unfinished` to the folder above it, and deletes old ones there."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add progress.json and move the checkpoint, when every process has written its part."""
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            unfinished = Path(args.output_dir)
            written, whole = (folder / f"checkpoint-{state.global_step}" for folder in (unfinished, unfinished.parent))
            progress = {"seconds": self.trainer.seconds(), "num_processes": args.world_size}
            progress["sharding"] = self.trainer.sharding
            write_json(written / PROGRESS, progress)
            if whole.exists():  # torn by a crash of the machine
                shutil.rmtree(whole)
            os.replace(written, whole)
            with suppress(OSError):  # beside the checkpoints stands nothing that is none
                unfinished.rmdir()
            for old in list_checkpoints(whole.parent)[NUM_KEPT:]:
                shutil.rmtree(old, ignore_errors=True)
        self.trainer.accelerator.wait_for_everyone()


def shield_workers(loader: DataLoader) -> DataLoader:
    """Make the workers of a data loader end on SIGTERM from their parent only.

    Slurm sends SIGTERM to every process of a job; a worker that dies of it raises in the middle of a training step.
    The loader may be accelerate's wrapper of another one.
    """
    for one in {id(part): part for part in (loader, getattr(loader, "base_dataloader", loader))}.values():
        one.worker_init_fn = partial(_init_worker, one.worker_init_fn)
    return loader


def _init_worker(stock_init: Any, worker_id: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_exit_on_sigterm_of_parent, daemon=True).start()
    if stock_init is not None:
        stock_init(worker_id)


def _exit_on_sigterm_of_parent() -> None:
    # The trainer ends its workers by SIGTERM too, and waits for them when it exits.
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
