"""DualSpeedTrainer: `transformers.Trainer` that decides which mode a step runs, and saves stock checkpoints."""

import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from dualspeed.errors import CheckpointError, ConfigError, SampleError
from dualspeed.method.model import DualSpeedModel, DualSpeedOutput, load_vlm
from dualspeed.settings.method import DualSpeedConfig
from dualspeed.settings.modes import Mode, mode_of_step
from dualspeed.training.micro_batches import micro_batches
from dualspeed.training.trainable import is_projector, is_vision


class DualSpeedTrainer(Trainer):
    """Trains a VLM in fast and slow steps; swap it for `Trainer`, give it a `DualSpeedConfig`, keep the rest."""

    def __init__(
        self,
        model: PreTrainedModel | DualSpeedModel,
        args: TrainingArguments,
        dualspeed: DualSpeedConfig | None = None,
        projector_learning_rate: float | None = None,
        vision_learning_rate: float | None = None,
        slow_batch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Set up training.

        Args:
            model: a stock VLM, or one already wrapped in a DualSpeedModel.
            dualspeed: the method's settings; None: those of a wrapped model, or the paper's.
            projector_learning_rate: of projector and isolator; None: `args.learning_rate`.
            vision_learning_rate: of the vision tower, where it is trained; None: `args.learning_rate`.
            slow_batch_size: samples that a device takes at once in a slow step, where that is less than in a fast one;
                the data collator then gives `num_images`, a list of how many each sample has, as well.
            kwargs: as for `transformers.Trainer`; the data collator gives input_ids, attention_mask, labels and,
                where a batch has images, pixel_values and what else the VLM takes.
        """
        if isinstance(model, DualSpeedModel):
            if dualspeed not in (None, model.dualspeed):
                raise ConfigError("the model carries other DualSpeed settings than `dualspeed`; give them once")
        else:
            set_seed(args.seed)  # the isolator's initial values are a function of the seed
            model = DualSpeedModel(model, dualspeed or DualSpeedConfig())
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # every parameter is in the graph of every step
        # The columns are for the collator: the model's signature says nothing about them.
        args.remove_unused_columns = False
        self.learning_rates = {"projector": projector_learning_rate, "vision": vision_learning_rate}
        # Of the weights that are saved; None: as they are trained, which resuming needs.
        self.save_dtype: torch.dtype | None = None
        self.slow_batch_size = slow_batch_size
        self._losses: dict[str, list[Tensor]] = defaultdict(list)
        self._steps: dict[Mode, set[int]] = defaultdict(set)
        self._sums: dict[str, list[Tensor]] = defaultdict(list)
        self._logged_at = time.perf_counter()
        self._is_ongoing = False
        self.evaluation_seconds = 0.0
        """Time that evaluations took, which throughput leaves out."""
        super().__init__(model=model, args=args, **kwargs)
        if slow_batch_size is not None and self.is_deepspeed_enabled:
            raise ConfigError("slow_batch_size is not for DeepSpeed, whose engine counts micro-batches itself")
        self.add_callback(FrozenIsolatorInSlowSteps(self))

    def mode_of_step(self, step: int) -> Mode:
        """Mode of an optimizer step, the same on every rank and after every resume."""
        config = self.accelerator.unwrap_model(self.model).dualspeed
        return mode_of_step(self.args.seed, step, config.slow_mode_ratio, config.mode_schedule)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of a micro-batch; a slow step's in parts of `slow_batch_size`."""
        inputs = dict(inputs)
        num_images, size = inputs.pop("num_images", None), self.slow_batch_size
        is_fast = self.mode_of_step(self.state.global_step) is Mode.FAST
        if is_fast or size is None or len(inputs["input_ids"]) <= size:
            return super().training_step(model, inputs, num_items_in_batch)
        if num_images is None:
            raise SampleError("slow_batch_size needs `num_images` in each batch, which the data collator doesn't give")
        *first, last = micro_batches(inputs, num_images, size)
        with self.accelerator.no_sync(model):
            losses = [super(DualSpeedTrainer, self).training_step(model, part, num_items_in_batch) for part in first]
        losses.append(super().training_step(model, last, num_items_in_batch))
        return torch.stack(losses).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, DualSpeedOutput]:
        """Loss of a micro-batch in the mode of its step; in evaluation, cross-entropy on all tokens."""
        mode = self.mode_of_step(self.state.global_step) if model.training else Mode.SLOW
        outputs = model(
            **{name: values for name, values in inputs.items() if name != "num_images"},  # `training_step` reads it
            mode=mode,
            distill=model.training,
            pruning_seed=(self.args.seed << 32) + self.state.global_step,
            num_items_in_batch=num_items_in_batch,
        )
        # The ranks' gradients are averaged, while each loss is a share of the sum over all ranks' tokens.
        is_share = self.args.average_tokens_across_devices and num_items_in_batch is not None
        scale = self.accelerator.num_processes if is_share else 1
        if model.training:
            self._record(inputs, outputs, mode, scale)
        loss = outputs.loss * scale
        return (loss, outputs) if return_outputs else loss

    def _record(self, inputs: dict[str, Any], outputs: DualSpeedOutput, mode: Mode, scale: int) -> None:
        """Keep a micro-batch's figures on the device; `log` brings them home."""
        self._learning_rates = {f"learning_rate/{group['name']}": group["lr"] for group in self.optimizer.param_groups}
        self._steps[mode].add(self.state.global_step)
        self._sums["tokens"].append(inputs["attention_mask"].sum())
        self._sums["samples"].append(inputs["input_ids"].new_tensor(len(inputs["input_ids"])))
        self._sums["batches_without_supervision"].append(inputs["input_ids"].new_tensor(len(outputs.logits) == 0))
        self._losses[f"{mode}/ce_loss"].append(outputs.ce_loss.detach() * scale)
        if outputs.distillation_loss is not None:
            self._losses[f"{mode}/distillation_loss"].append(outputs.distillation_loss.detach() * scale)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to the stock record what happened since the last one: losses of each mode, throughput, learning rates."""
        if "loss" in logs:
            # A step's loss is the sum of its micro-batches' shares.
            for name, values in self._losses.items():
                logs[name] = torch.stack(values).sum().item() / len(self._steps[Mode(name.partition("/")[0])])
            totals = {name: torch.stack(values).sum().item() for name, values in self._sums.items()}
            seconds = time.perf_counter() - self._logged_at
            for name in ("tokens", "samples"):
                logs[f"{name}_per_second"] = totals[name] * self.accelerator.num_processes / seconds
            logs["batches_without_supervision"] = totals["batches_without_supervision"]
            logs |= self._learning_rates
            self._losses.clear()
            self._steps.clear()
            self._sums.clear()
            self._logged_at = time.perf_counter()
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the stock trainer's, but training goes on as if there had been none: random numbers and throughput."""
        device, started = self.args.device, time.perf_counter()
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            metrics = super().evaluate(*args, **kwargs)
        seconds = time.perf_counter() - started
        self._logged_at += seconds
        self.evaluation_seconds += seconds
        return metrics

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As the stock trainer's, with a group of its own for projector and isolator."""
        model = self.model if model is None else model
        if self.optimizer is None:
            optimizer_class, arguments = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer: torch.optim.Optimizer = optimizer_class(self._parameter_groups(model), **arguments)
        return self.optimizer

    def _parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Trainable parameters by learning rate and weight decay; the isolator never decays."""
        decaying = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[str, bool], list[nn.Parameter]] = defaultdict(list)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                part = "projector" if is_projector(name) else "vision" if is_vision(name) else "model"
                groups[part, name in decaying and "mode_isolator" not in name].append(parameter)
        return [
            {
                "name": f"{part}{'' if decays else '_no_decay'}",
                "params": parameters,
                "lr": self.learning_rates.get(part) or self.args.learning_rate,
                "weight_decay": self.args.weight_decay if decays else 0.0,
            }
            for (part, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
        ]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the stock trainer's, but adapters are merged only where training ends: it goes on from them alone."""
        self._is_ongoing = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._is_ongoing = False

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write a stock checkpoint with the isolator beside it (the stock trainer writes prefixed names)."""
        if not self.args.should_save:
            return
        output_dir, merged = output_dir or self.args.output_dir, not self._is_ongoing
        self.accelerator.unwrap_model(self.model).save_pretrained(output_dir, state_dict, self.save_dtype, merged)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load what `_save` wrote; raises on a missing or unexpected weight."""
        if self.is_fsdp_enabled:
            # Sharded weights lie beside the stock checkpoint, in accelerate's own format.
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        inner: DualSpeedModel = self.accelerator.unwrap_model(self.model if model is None else model)
        if inner.has_adapters:
            from dualspeed.method import adapters  # needs peft

            adapters.load_adapters(inner.vlm, Path(resume_from_checkpoint) / adapters.ADAPTER_FOLDER)
        else:
            # Trained weights may be held in more bits than frozen ones.
            saved = load_vlm(resume_from_checkpoint, dtype=torch.promote_types(inner.vlm.dtype, torch.float32))
            inner.vlm.load_state_dict(saved.state_dict(), strict=True)
        if inner.mode_isolator is not None and not inner.load_isolator(resume_from_checkpoint):
            raise CheckpointError(f"{resume_from_checkpoint}: the checkpoint has no mode isolator to resume with")


class FrozenIsolatorInSlowSteps(TrainerCallback):
    """A slow step gives the isolator a gradient of 0, which AdamW's momentum would still turn into an update."""

    def __init__(self, trainer: DualSpeedTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hide the isolator from the optimizer in a slow step."""
        isolator = self.trainer.accelerator.unwrap_model(self.trainer.model).mode_isolator
        if isolator is not None and self.trainer.mode_of_step(state.global_step) is Mode.SLOW:
            isolator.weight.grad = None
