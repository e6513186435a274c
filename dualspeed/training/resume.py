"""Checkpoints to resume from: whole or absent, the last two kept, each with what the trainer's own state leaves out.

`progress.json` in a checkpoint says how many seconds the stage has taken so far and on how many processes it runs.
"""

import json
import logging
import os
import shutil
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Dataset

from dualspeed.errors import WorldSizeError
from dualspeed.files import write_json
from dualspeed.training.trainer import DualSpeedTrainer

TRAINER_STATE, PROGRESS = "trainer_state.json", "progress.json"
UNFINISHED = ".unfinished"
NUM_KEPT = 2
logger = logging.getLogger(__name__)


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in a folder, the newest first."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2]))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that can be read, None where there is none."""
    for checkpoint in list_checkpoints(folder):
        try:
            json.loads((checkpoint / TRAINER_STATE).read_text())
            return checkpoint
        except (FileNotFoundError, json.JSONDecodeError):
            logger.warning("%s was cut off while it was written; an older one serves", checkpoint)
    return None


def read_progress(checkpoint: Path | None) -> dict[str, Any]:
    """What progress.json of a checkpoint holds; empty for none."""
    file = checkpoint / PROGRESS if checkpoint else None
    return json.loads(file.read_text()) if file and file.exists() else {}


def check_num_processes(checkpoint: Path | None, num_processes: int) -> None:
    """Raise WorldSizeError unless the run was started on this many processes."""
    before = read_progress(checkpoint).get("num_processes", num_processes)
    if checkpoint and before != num_processes:
        raise WorldSizeError(
            f"this run was started on {before} processes and this job has {num_processes}: it would see its data in "
            f"another order. Run it on {before}, or delete {checkpoint.parent} to train it from its first step"
        )


class ResumableTrainer(DualSpeedTrainer):
    """Writes checkpoints under a temporary name and moves them, so that a torn one is never resumed from."""

    def __init__(self, *args: Any, started: float, **kwargs: Any) -> None:
        """As DualSpeedTrainer; `started`: the `time.monotonic()` of a start without interruptions."""
        self._started = started
        self._is_saving = False
        super().__init__(*args, **kwargs)
        if self.is_world_process_zero():
            shutil.rmtree(self._unfinished, ignore_errors=True)

    def seconds(self) -> float:
        """Wall clock of the stage so far, over all its jobs, without its validations."""
        return time.monotonic() - self._started - self.evaluation_seconds

    def get_train_dataloader(self) -> DataLoader:
        """The stock one, whose workers leave SIGTERM to the trainer."""
        return shield_workers(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """Likewise."""
        return shield_workers(super().get_eval_dataloader(eval_dataset))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # The stock loop looks whether training is over after a step; resumed at the end, it would train one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    @property
    def _unfinished(self) -> Path:
        return Path(self.args.output_dir) / UNFINISHED

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._unfinished) if self._is_saving else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._is_saving = False
        self.accelerator.wait_for_everyone()  # every process has written its part
        if self.is_world_process_zero():
            name = f"checkpoint-{self.state.global_step}"
            progress = {"seconds": self.seconds(), "num_processes": self.args.world_size}
            write_json(self._unfinished / name / PROGRESS, progress)
            folder = Path(self.args.output_dir)
            if (folder / name).exists():  # torn by a crash of the machine
                shutil.rmtree(folder / name)
            os.replace(self._unfinished / name, folder / name)
            self._unfinished.rmdir()
            for old in list_checkpoints(folder)[NUM_KEPT:]:
                shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()


def shield_workers(loader: DataLoader) -> DataLoader:
    """Let the workers of a loader, which may be accelerate's wrapper, end on their parent's SIGTERM alone.

    Slurm sends it to every process of a job; a worker that dies of it raises in the middle of a training step.
    """
    for one in {id(part): part for part in (loader, getattr(loader, "base_dataloader", loader))}.values():
        one.worker_init_fn = partial(_init_worker, one.worker_init_fn)
    return loader


def _init_worker(stock_init: Any, worker_id: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_for_parent_alone, daemon=True).start()
    if stock_init is not None:
        stock_init(worker_id)


def _end_for_parent_alone() -> None:
    # The trainer ends its workers by SIGTERM too, and waits for them when it exits.
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
