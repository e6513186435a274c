"""Saving and loading of a trainer's model: stock checkpoints with the isolator beside them.

The stock trainer would write parameter names that begin with `vlm.`, and load the best checkpoint by them.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dualspeed.errors import CheckpointError
from dualspeed.layout import METHOD_FILE
from dualspeed.method.checkpoint import load_vlm
from dualspeed.method.isolator import ISOLATOR_FILE
from dualspeed.method.model import DualSpeedModel

ARGUMENTS_FILE = "training_args.bin"
ADAPTER_FOLDER = "adapter"

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object


class SavesStockCheckpoints(Base):
    """Mixin of a Trainer whose model is a DualSpeedModel.

    `save_model` writes what other software loads: in the dtype that the model came in, adapters merged. A checkpoint to
    resume from keeps the dtype of training, and of a model with adapters the adapters alone.
    """

    _is_checkpoint = False
    """True while a checkpoint to resume from is written."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the whole model, gathered from all ranks; each rank must call it.

        The stock trainer writes no weights under FSDP with sharded checkpoints, which are enough to resume from.
        """
        if self.is_fsdp_enabled and not self._is_checkpoint:
            self._save(output_dir, self.accelerator.get_state_dict(self.model))
            if self.args.push_to_hub and not _internal_call:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
            return
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint to resume from."""
        self._is_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._is_checkpoint = False

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write model, processor and training arguments; only the process that saves calls it to an effect."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        model: DualSpeedModel = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        dtype = None if self._is_checkpoint else model.stored_dtype
        model.save_pretrained(folder, state_dict, dtype, merged=not self._is_checkpoint)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / ARGUMENTS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the files of `_save`; raises on a missing or unexpected weight."""
        if self.is_fsdp_enabled:
            # Sharded weights are beside the stock checkpoint, in accelerate's own format.
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        inner: DualSpeedModel = self.accelerator.unwrap_model(
            self.model if model is None else model, keep_torch_compile=False
        )
        if inner.has_adapters:
            from dualspeed.method import adapters  # needs peft

            adapters.load_adapters(inner.vlm, Path(resume_from_checkpoint) / adapters.ADAPTER_FOLDER)
        else:
            # Trainable weights may be in float32 and frozen ones in bfloat16.
            saved = load_vlm(resume_from_checkpoint, dtype=torch.promote_types(inner.vlm.dtype, torch.float32))
            inner.vlm.load_state_dict(saved.state_dict(), strict=True)
        if inner.mode_isolator is not None and not inner.load_isolator(resume_from_checkpoint):
            raise CheckpointError(f"{resume_from_checkpoint}: the checkpoint has no mode isolator to resume with")

    def _load_best_model(self) -> None:
        """Load the best checkpoint, with its isolator; the stock trainer finds weights by its own names."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
            return
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint with the method's files, which the stock trainer doesn't know."""
        checkpoint, out = Path(checkpoint_folder), Path(self.args.output_dir)
        if self.is_world_process_zero():
            for name in (ISOLATOR_FILE, METHOD_FILE):
                if (checkpoint / name).is_file():
                    shutil.copy(checkpoint / name, out / name)
            if (checkpoint / ADAPTER_FOLDER).is_dir():
                shutil.copytree(checkpoint / ADAPTER_FOLDER, out / ADAPTER_FOLDER, dirs_exist_ok=True)
        super()._push_from_checkpoint(checkpoint_folder)
