"""DualSpeedTrainer: a `transformers.Trainer` that chooses the mode of each step and saves stock checkpoints."""

import time
from collections import defaultdict
from contextlib import nullcontext
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
from dualspeed.method.checkpoint import load_vlm
from dualspeed.method.model import DualSpeedModel, DualSpeedOutput
from dualspeed.settings.method import DualSpeedConfig
from dualspeed.settings.modes import Mode, mode_of_step
from dualspeed.settings.sharding import DDP, ZERO3
from dualspeed.training.micro_batches import micro_batches
from dualspeed.training.trainable import parts_of


class DualSpeedTrainer(Trainer):
    """Trains a VLM in fast and slow steps; takes the place of `Trainer`, with a `DualSpeedConfig` as well.

    Example:
        >>> trainer = DualSpeedTrainer(
        ...     model=vlm,
        ...     args=TrainingArguments("out"),
        ...     dualspeed=DualSpeedConfig(pruner="divprune"),
        ...     train_dataset=dataset,
        ...     data_collator=ConversationCollator(processor),
        ...     processing_class=processor,
        ... )
        >>> trainer.train()
    """

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
            model: a stock VLM, or a DualSpeedModel.
            dualspeed: settings of the method; None: those of the DualSpeedModel, or the paper's for a stock VLM.
            projector_learning_rate: learning rate of projector and isolator; None: `args.learning_rate`.
            vision_learning_rate: learning rate of the vision tower, if it is trainable; None: `args.learning_rate`.
            slow_batch_size: samples of a micro-batch of a slow step on each device; larger batches are split. The data
                collator must then also give `num_images`, a list with the number of images of each sample. None: no
                split.
            kwargs: as for `transformers.Trainer`; the data collator gives input_ids, attention_mask, labels and, for a
                batch with images, pixel_values and the VLM's other image inputs.
        """
        if isinstance(model, DualSpeedModel):
            if dualspeed not in (None, model.dualspeed):
                raise ConfigError("the model carries other DualSpeed settings than `dualspeed`; give them once")
        else:
            set_seed(args.seed)  # the isolator's initial values are a function of the seed
            model = DualSpeedModel(model, dualspeed or DualSpeedConfig())
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # every parameter is in the graph of every step
        args.remove_unused_columns = False  # columns are inputs of the collator, not of the model
        self.learning_rates = {"projector": projector_learning_rate, "vision": vision_learning_rate}
        self.slow_batch_size = slow_batch_size
        self.save_dtype: torch.dtype | None = None
        """Dtype of saved weights; None: as they are trained, which resuming needs."""
        self._merges_adapters = True
        self._losses: dict[tuple[Mode, str], list[Tensor]] = defaultdict(list)
        self._steps: dict[Mode, set[int]] = defaultdict(set)
        self._sums: dict[str, list[Tensor]] = defaultdict(list)
        self._logged_at = time.perf_counter()
        self.evaluation_seconds = 0.0
        """Total duration of the evaluations, which the throughput leaves out."""
        super().__init__(model=model, args=args, **kwargs)
        if self.is_fsdp_enabled:
            # Between micro-batches FSDP2 would keep whole gradients on every rank; so it keeps its shard of them.
            self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
        if slow_batch_size is not None and self.is_deepspeed_enabled:
            raise ConfigError("slow_batch_size: DeepSpeed's engine counts micro-batches itself; valid: None")
        self.add_callback(FrozenIsolatorInSlowSteps(self))

    @property
    def sharding(self) -> str:
        """How the processes share the model, in the words of `dualspeed.settings.sharding.Sharding.name`."""
        if self.is_deepspeed_enabled:
            return f"zero{self.accelerator.state.deepspeed_plugin.zero_stage}"
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            is_whole = "FULL_STATE_DICT" in str(plugin.state_dict_type)
            return f"fsdp{plugin.fsdp_version}" + (" (FULL_STATE_DICT)" if is_whole else "")
        return DDP

    def mode_of_step(self, step: int) -> Mode:
        """Mode of the optimizer step `step`, from 0; the same on every rank and after every resume."""
        config = self.accelerator.unwrap_model(self.model).dualspeed
        return mode_of_step(self.args.seed, step, config.slow_mode_ratio, config.mode_schedule)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run forward and backward pass of a batch; in a slow step, of micro-batches of `slow_batch_size` samples."""
        inputs = dict(inputs)
        num_images, size = inputs.pop("num_images", None), self.slow_batch_size
        is_fast = self.mode_of_step(self.state.global_step) is Mode.FAST
        if is_fast or size is None or len(inputs["input_ids"]) <= size:
            return super().training_step(model, inputs, num_items_in_batch)
        if num_images is None:
            raise SampleError("slow_batch_size needs `num_images` in each batch, which the data collator doesn't give")
        *first, last = micro_batches(inputs, num_images, size)
        with nullcontext() if self.is_fsdp_enabled else self.accelerator.no_sync(model):
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
        """Loss of a micro-batch in the mode of its step; in evaluation, the cross-entropy on all tokens."""
        mode = self.mode_of_step(self.state.global_step) if model.training else Mode.SLOW
        self._forget_order_of_calls()
        outputs = model(
            **{name: values for name, values in inputs.items() if name != "num_images"},  # for `training_step` only
            mode=mode,
            distill=model.training,
            pruning_seed=(self.args.seed << 32) + self.state.global_step,
            num_items_in_batch=num_items_in_batch,
        )
        # Gradients are averaged over ranks, while each rank's loss is its share of the sum over all ranks' tokens.
        is_share = self.args.average_tokens_across_devices and num_items_in_batch is not None
        scale = self.accelerator.num_processes if is_share else 1
        if model.training:
            self._record(inputs, outputs, mode, scale)
        loss = outputs.loss * scale
        return (loss, outputs) if return_outputs else loss

    def _forget_order_of_calls(self) -> None:
        """Let ZeRO-3 expect no order of calls: fast steps, slow steps and recomputed layers differ in theirs.

        It would compare each micro-batch with the order of an earlier one, and may raise where they begin alike.
        """
        if self.sharding == ZERO3:
            coordinator = self.model_wrapped.optimizer.parameter_offload.get_param_coordinator()
            if not coordinator.is_invalid_trace():
                coordinator._invalidate_trace()

    def _record(self, inputs: dict[str, Any], outputs: DualSpeedOutput, mode: Mode, scale: int) -> None:
        """Accumulate a micro-batch's losses and counts on the device; `log` copies them to the host."""
        self._learning_rates = {f"learning_rate/{group['name']}": group["lr"] for group in self.optimizer.param_groups}
        self._steps[mode].add(self.state.global_step)
        self._sums["tokens"].append(inputs["attention_mask"].sum())
        self._sums["samples"].append(inputs["input_ids"].new_full((), len(inputs["input_ids"])))
        self._sums["batches_without_supervision"].append(inputs["input_ids"].new_full((), len(outputs.logits) == 0))
        self._losses[mode, "ce_loss"].append(outputs.ce_loss.detach() * scale)
        if outputs.distillation_loss is not None:
            self._losses[mode, "distillation_loss"].append(outputs.distillation_loss.detach() * scale)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; a training record also gets mean losses by mode, throughput and learning rates since the last one."""
        if "loss" in logs:
            logs |= self._totals_of_ranks(time.perf_counter() - self._logged_at) | self._learning_rates
            self._losses.clear()
            self._steps.clear()
            self._sums.clear()
            self._logged_at = time.perf_counter()
        super().log(logs, start_time)

    def _totals_of_ranks(self, seconds: float) -> dict[str, float]:
        """Mean losses by mode, and throughput over `seconds`, of all ranks together; each rank must call it."""
        # The loss of a step is the sum over its micro-batches, which are shares of it, and the mean over ranks.
        losses = {
            f"{mode}/{name}": torch.stack(values).sum() / len(self._steps[mode])
            for (mode, name), values in self._losses.items()
        }
        totals = {name: torch.stack(values).sum() for name, values in self._sums.items()}
        logs, sums = self._reduced(losses, "mean"), self._reduced(totals, "sum")
        for name in ("tokens", "samples"):
            logs[f"{name}_per_second"] = sums[name] / seconds
        return logs | {"batches_without_supervision": sums["batches_without_supervision"]}

    def _reduced(self, values: dict[str, Tensor], reduction: str) -> dict[str, float]:
        """Scalars of the same names on every rank -> their `mean` or `sum` over ranks, copied to the host at once."""
        stacked = torch.stack([value.float() for value in values.values()])
        return dict(zip(values, self.accelerator.reduce(stacked, reduction).tolist(), strict=True))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate without an effect on training: random state and throughput stay as they were."""
        device, started = self.args.device, time.perf_counter()
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            metrics = super().evaluate(*args, **kwargs)
        seconds = time.perf_counter() - started
        self._logged_at += seconds
        self.evaluation_seconds += seconds
        return metrics

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the stock optimizer, with parameter groups for projector and vision tower."""
        model = self.model if model is None else model
        if self.optimizer is None:
            optimizer_class, arguments = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer: torch.optim.Optimizer = optimizer_class(self._parameter_groups(model), **arguments)
        return self.optimizer

    def _parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Trainable parameters by part, hence learning rate, and by weight decay; the isolator never decays."""
        inner: DualSpeedModel = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        parts, decaying = parts_of(inner), set(self.get_decay_parameter_names(inner))
        groups: dict[tuple[str, bool], list[nn.Parameter]] = defaultdict(list)
        for name, parameter in inner.named_parameters():
            if parameter.requires_grad:
                group = parts[name] if parts[name] in self.learning_rates else "model"
                groups[group, name in decaying and "mode_isolator" not in name].append(parameter)
        return [
            {
                "name": f"{group}{'' if decays else '_no_decay'}",
                "params": parameters,
                "lr": self._learning_rate(group),
                "weight_decay": self.args.weight_decay if decays else 0.0,
            }
            for (group, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
        ]

    def _learning_rate(self, group: str) -> float:
        """Learning rate of a group of parts; 0 holds its weights as they are."""
        rate = self.learning_rates.get(group)
        return self.args.learning_rate if rate is None else rate

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the whole model, gathered from all ranks; each rank must call it.

        The stock trainer writes no weights under FSDP with sharded checkpoints, which are enough to resume from.
        """
        if self.is_fsdp_enabled and not _internal_call:
            self._save(output_dir, self.accelerator.get_state_dict(self.model))
            if self.args.push_to_hub:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
            return
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint to resume from, with adapters alone: training doesn't change the weights they adapt."""
        self._merges_adapters = False
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._merges_adapters = True

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write a stock checkpoint with the isolator beside it (the stock trainer writes prefixed names)."""
        if not self.args.should_save:
            return
        folder = output_dir or self.args.output_dir
        model: DualSpeedModel = self.accelerator.unwrap_model(self.model)
        model.save_pretrained(folder, state_dict, self.save_dtype, merged=self._merges_adapters)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the files of `_save`; raises on a missing or unexpected weight."""
        if self.is_fsdp_enabled:
            # Sharded weights are beside the stock checkpoint, in accelerate's own format.
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        inner: DualSpeedModel = self.accelerator.unwrap_model(self.model if model is None else model)
        if inner.has_adapters:
            from dualspeed.method import adapters  # needs peft

            adapters.load_adapters(inner.vlm, Path(resume_from_checkpoint) / adapters.ADAPTER_FOLDER)
        else:
            # Trainable weights may be in float32 and frozen ones in bfloat16.
            saved = load_vlm(resume_from_checkpoint, dtype=torch.promote_types(inner.vlm.dtype, torch.float32))
            inner.vlm.load_state_dict(saved.state_dict(), strict=True)
        if inner.mode_isolator is not None and not inner.load_isolator(resume_from_checkpoint):
            raise CheckpointError(f"{resume_from_checkpoint}: the checkpoint has no mode isolator to resume with")


class FrozenIsolatorInSlowSteps(TrainerCallback):
    """Keeps the isolator unchanged in slow steps, where AdamW's momentum would update it even with a gradient of 0."""

    def __init__(self, trainer: DualSpeedTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the isolator's gradient in a slow step, so that the optimizer skips it."""
        isolator = self.trainer.accelerator.unwrap_model(self.trainer.model).mode_isolator
        if isolator is not None and self.trainer.mode_of_step(state.global_step) is Mode.SLOW:
            isolator.weight.grad = None
