"""Trainer callbacks: the log of a training's metrics, and a stop before the time of its job is over."""

import logging
import signal
import time
from numbers import Real
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dualspeed.tracking.metric_log import MetricLog
from dualspeed.training.validation import as_logged

MARGIN_SECONDS = 300.0
"""Time that is kept for the last step and its checkpoint, at most half of the limit."""
OUT_OF_TIME, TERMINATED = 1, 2
REASONS = {OUT_OF_TIME: "its time is nearly over", TERMINATED: "SIGTERM"}
"""Code that processes agree on -> why training stops before its last step."""
logger = logging.getLogger(__name__)


class MetricLogCallback(TrainerCallback):
    """Writes the numbers of each `Trainer.log` call to a MetricLog, on the first process only."""

    def __init__(self, metric_log: MetricLog) -> None:
        self.metric_log = metric_log

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write `logs` under the current optimizer step, without texts, bools and totals of an interrupted run."""
        is_interrupted_total = "train_runtime" in (logs or {}) and state.global_step < state.max_steps
        if not state.is_world_process_zero or not logs or is_interrupted_total:
            return
        named = as_logged(logs)
        numbers = {
            key: float(value) for key, value in named.items() if isinstance(value, Real) and not isinstance(value, bool)
        }
        self.metric_log.log(state.global_step, numbers)


class StopInTime(TrainerCallback):
    """Stops with a checkpoint at the end of the current step, on SIGTERM or when the job's time is nearly over.

    The stock `enable_jit_checkpoint` first waits three seconds, which Slurm's KillWait may not leave, and each process
    decides for itself; here all processes stop after the same step. Used as a context: it handles SIGTERM inside, and
    restores the previous handler at the end.
    """

    def __init__(self, limit_minutes: float | None = None) -> None:
        """Args: limit_minutes: time that the job has, counted from now; None: no limit."""
        self.reason = ""
        """Why training stopped; empty if it did not."""
        self._is_terminated = False
        seconds = None if limit_minutes is None else 60 * limit_minutes
        self._deadline = seconds and time.monotonic() + seconds - min(MARGIN_SECONDS, seconds / 2)

    def __enter__(self) -> "StopInTime":
        self._handler_before = signal.signal(signal.SIGTERM, self._note_sigterm)
        return self

    def __exit__(self, *_: Any) -> None:
        signal.signal(signal.SIGTERM, self._handler_before)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log, save and stop if it is time to and this step is not the last one."""
        code = OUT_OF_TIME if self._deadline is not None and time.monotonic() > self._deadline else 0
        code = _largest_of_processes(TERMINATED if self._is_terminated else code, args)
        if code and state.global_step < state.max_steps:
            self.reason = REASONS[code]
            logger.warning("%s: training stops with a checkpoint after step %d", self.reason, state.global_step)
            control.should_log = control.should_save = control.should_training_stop = True

    def _note_sigterm(self, *_: Any) -> None:
        self._is_terminated = True


def _largest_of_processes(value: int, args: TrainingArguments) -> int:
    """Largest `value` of all processes."""
    if args.world_size == 1:
        return value
    tensor = torch.tensor(value, device=args.device)
    torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
    return int(tensor)
