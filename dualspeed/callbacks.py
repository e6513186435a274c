"""What the trainer reports while it trains."""

from numbers import Real
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dualspeed.tracking import MetricLog


class MetricLogCallback(TrainerCallback):
    """Writes the numbers of each `Trainer.log` call to a MetricLog, from the first process alone."""

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
        """Forward `logs` under the current optimizer step; texts and flags are left out."""
        if not state.is_world_process_zero or not logs:
            return
        numbers = {key: value for key, value in logs.items() if isinstance(value, Real) and not isinstance(value, bool)}
        self.metric_log.log(state.global_step, numbers)
