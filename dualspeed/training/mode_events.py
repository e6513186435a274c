"""Callback of a trainer in fast and slow steps."""

import logging
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.liger import apply_liger_kernel

from dualspeed.settings.modes import Mode

if TYPE_CHECKING:
    from dualspeed.training.mixin import DualSpeedMixin

logger = logging.getLogger(__name__)


class ModeEvents(TrainerCallback):
    """Additions of the method to the events of training."""

    def __init__(self, trainer: "DualSpeedMixin") -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget the sums of an attempt that had too large a batch (auto_find_batch_size); apply Liger's kernels."""
        self.trainer._totals.clear()
        if args.use_liger_kernel:
            # The stock trainer looks for a stock model, finds none, and warns that it applies no kernels.
            apply_liger_kernel(self.trainer.inner_model.vlm, args.liger_kernel_config)
            logger.warning("Liger's kernels are applied to the VLM, whatever transformers' warning says")

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the isolator's gradient in a slow step: AdamW's momentum would update it even with a gradient of 0."""
        isolator = self.trainer.inner_model.mode_isolator
        if isolator is not None and self.trainer.mode_of_step(state.global_step) is Mode.SLOW:
            isolator.weight.grad = None
