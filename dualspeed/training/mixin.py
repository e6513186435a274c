"""DualSpeedMixin: makes a `transformers.Trainer`, or a subclass of it, train in fast and slow steps."""

import logging
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import fields, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments, set_seed

from dualspeed.batch import IGNORE_INDEX
from dualspeed.errors import ConfigError
from dualspeed.method.model import DualSpeedModel
from dualspeed.method.objective import Objective
from dualspeed.method.outputs import DualSpeedOutput
from dualspeed.settings.method import DualSpeedConfig
from dualspeed.settings.modes import Mode
from dualspeed.settings.sharding import DDP, ZERO3
from dualspeed.training.arguments import check_arguments, check_dtypes, eval_modes_of, named_arguments, set_defaults
from dualspeed.training.micro_batches import parts_of
from dualspeed.training.mode_events import ModeEvents
from dualspeed.training.optimizer import check_rates, split_groups
from dualspeed.training.random_state import kept_random_state
from dualspeed.training.saving import SavesStockCheckpoints
from dualspeed.training.stored_features import StoresFeatures
from dualspeed.training.token_batches import check_division, division, token_budgets
from dualspeed.training.totals import Totals
from dualspeed.training.trainable import freeze_untrained

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object


class DualSpeedMixin(StoresFeatures, SavesStockCheckpoints, Base):
    """Mixin that stands before a Trainer: `class DualSpeedTrainer(DualSpeedMixin, Trainer)`.

    The trainer is made with the stock model. Then a DualSpeedModel takes the model's place.

    Args:
        model: a stock VLM, whose vision tower is then frozen unless it has a learning rate, with adapters of peft
            or without; or a DualSpeedModel, of which the caller chose the trainable parameters.
        dualspeed: settings of the method; None: those of the DualSpeedModel, or the paper's for a stock VLM.
        projector_learning_rate: learning rate of projector and isolator; None: `args.learning_rate`.
        vision_learning_rate: learning rate of the vision tower; None: frozen, or for a DualSpeedModel with a
            trainable tower `args.learning_rate`.
        slow_batch_size: samples of a micro-batch of a slow step on each device; larger batches are split. The data
            collator must then also give `num_images`, a list with the number of images of each sample. None: no
            split.
        tokens_per_batch: divide the `per_device_train_batch_size` samples of a step by their lengths into
            micro-batches of at most so many tokens, padding included; in fast steps the tokens after pruning. The
            collator gives `num_images`, too. None: no division.
        slow_tokens_per_batch: the same in slow steps; None: `tokens_per_batch`.
        packing: join the rows of a micro-batch behind one another, without padding, of which budgets then count
            none. The model's attention has to read cumulative lengths: flash or flex attention.
        eval_mode: `slow` evaluates on all tokens, `fast` on pruned ones, with metrics named `eval_fast_*`, `both`
            does both.
        cache_features: folder that keeps what the frozen vision tower makes of each image, which is encoded once,
            before training, and read in every step. None: the tower runs in every step.
        positional, kwargs: as for the trainer; the data collator gives input_ids, attention_mask, labels and, for a
            batch with images, pixel_values and the VLM's other image inputs.
    """

    model: Any
    data_collator: Any
    predicts_supervised_only = False
    """True makes predictions the (M, V) logits of supervised tokens alone; else they are (N, L, V), as stock ones."""

    def __init__(
        self,
        model: PreTrainedModel | DualSpeedModel | None = None,
        args: TrainingArguments | None = None,
        *positional: Any,
        dualspeed: DualSpeedConfig | None = None,
        projector_learning_rate: float | None = None,
        vision_learning_rate: float | None = None,
        slow_batch_size: int | None = None,
        tokens_per_batch: int | None = None,
        slow_tokens_per_batch: int | None = None,
        packing: bool = False,
        eval_mode: str = "slow",
        cache_features: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Set up training; the arguments are those of the class."""
        args = TrainingArguments("tmp_trainer") if args is None else args
        if isinstance(model, DualSpeedModel) and dualspeed not in (None, model.dualspeed):
            raise ConfigError("the model carries other DualSpeed settings than `dualspeed`; give them once")
        self.dualspeed = model.dualspeed if isinstance(model, DualSpeedModel) else dualspeed or DualSpeedConfig()
        self.learning_rates = {"projector": projector_learning_rate, "vision": vision_learning_rate}
        self.slow_batch_size, self.packing = slow_batch_size, packing
        self.token_budgets = token_budgets(args, tokens_per_batch, slow_tokens_per_batch, slow_batch_size)
        self.eval_modes, self.cache_features = eval_modes_of(eval_mode), cache_features
        self.evaluation_seconds = 0.0
        """Total duration of the evaluations, which the throughput leaves out."""
        self._totals = Totals()
        self._evaluated_mode: Mode | None = None
        self._has_checked_labels = False
        set_defaults(args)
        check_arguments(
            args, self.dualspeed, self.learning_rates, named_arguments(super().__init__, positional, kwargs)
        )
        super().__init__(model, args, *positional, **kwargs)
        made: PreTrainedModel | DualSpeedModel = self.model
        if isinstance(made, DualSpeedModel):
            check_dtypes(made, self.accelerator.mixed_precision, self.is_deepspeed_enabled)
            freeze_untrained(made)
        else:
            self.model = self.model_wrapped = self.callback_handler.model = self.wrapped(made)
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True
        check_rates(self.model, self.learning_rates)
        check_division(self)
        self.add_callback(ModeEvents(self))

    def wrapped(self, vlm: PreTrainedModel, dualspeed: DualSpeedConfig | None = None) -> DualSpeedModel:
        """DualSpeedModel of a stock VLM; the isolator's initial values are a function of the seed.

        Random states stay as they were, so that shuffling and dropout are the stock trainer's.
        """
        check_dtypes(vlm, self.accelerator.mixed_precision, self.is_deepspeed_enabled)
        with kept_random_state(self.args.device):
            set_seed(self.args.seed)
            model = DualSpeedModel(vlm, dualspeed or self.dualspeed)
        freeze_untrained(model, trains_vision=bool(self.learning_rates["vision"]), is_stock=True)
        return model

    def call_model_init(self, trial: Any = None) -> DualSpeedModel:
        """New model of `model_init`; a trial of a search also chooses settings of the method, by their names."""
        model = super().call_model_init(trial)
        if isinstance(model, DualSpeedModel):
            return model
        names = {field.name for field in fields(DualSpeedConfig)}
        chosen = self.hp_space(trial) if trial is not None and hasattr(trial, "params") else trial or {}
        found = {name: value for name, value in chosen.items() if name in names}
        for name, value in found.items():
            setattr(self.args, name, value)  # else the stock trainer would warn that nothing takes them
        return self.wrapped(model, replace(self.dualspeed, **found))

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator; FSDP reduces the gradients of each micro-batch."""
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled:
            # Between micro-batches FSDP2 would keep whole gradients on every rank; so it keeps its shard of them.
            self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True

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

    @property
    def inner_model(self) -> DualSpeedModel:
        """Model without what DDP, FSDP, DeepSpeed or torch.compile put around it."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def mode_of_step(self, step: int) -> Mode:
        """Mode of the optimizer step `step`, from 0; the same on every rank and after every resume."""
        return self.inner_model.dualspeed.mode_of_step(self.args.seed, step, self.state.max_steps)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | int | None]:
        """Micro-batches of a step, and their number of supervised tokens, to which image placeholders never belong."""
        cleaned = (self._without_image_labels(batch) for batch in epoch_iterator)
        return super().get_batch_samples(cleaned, num_batches, device)

    def _without_image_labels(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Inputs whose labels leave out image placeholders, which pruning removes; said once."""
        if inputs.get("labels") is None:
            return inputs
        is_image = inputs["input_ids"] == self.inner_model.config.image_token_id
        labels = inputs["labels"].masked_fill(is_image, IGNORE_INDEX)
        if not self._has_checked_labels:
            self._has_checked_labels = True
            if not torch.equal(labels, inputs["labels"]):
                logger.warning("the data collator's labels supervise image placeholders; these labels are ignored")
        return {**inputs, "labels": labels}

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run forward and backward pass of a batch, or of the micro-batches that it is divided into."""
        inputs = dict(inputs)
        num_images = inputs.pop("num_images", None)
        groups, extents = division(self, inputs, num_images)
        if len(groups) == 1:
            return super().training_step(model, inputs, num_items_in_batch)
        parts, losses = parts_of(inputs, num_images, groups, extents), []
        with nullcontext() if self.is_fsdp_enabled else self.accelerator.no_sync(model):
            for part in islice(parts, len(groups) - 1):
                losses.append(super().training_step(model, part, num_items_in_batch))
        losses.append(super().training_step(model, next(parts), num_items_in_batch))
        return torch.stack(losses).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, DualSpeedOutput]:
        """Loss of a micro-batch in the mode of its step; in evaluation, without distillation."""
        is_training = model.training
        mode = self.mode_of_step(self.state.global_step) if is_training else self._evaluated_mode or Mode.SLOW
        self._forget_order_of_calls()
        outputs = model(
            **{name: values for name, values in inputs.items() if name != "num_images"},  # for `training_step` only
            mode=mode,
            distill=is_training,
            pruning_seed=(self.args.seed << 32) + self.state.global_step,
            num_items_in_batch=num_items_in_batch,
            objective=Objective(
                label_smoothing=self.args.label_smoothing_factor,
                function=self.compute_loss_func,
                all_logits=return_outputs and not self.predicts_supervised_only,
                packs=self.packing and is_training,
            ),
        )
        self.note_outputs(inputs, outputs)
        # Gradients are averaged over ranks, while each rank's loss is its share of the sum over all ranks' tokens.
        is_share = self.args.average_tokens_across_devices and num_items_in_batch is not None
        scale = self.accelerator.num_processes // self.get_tp_size() if is_share else 1
        if is_training:
            self._learning_rates = learning_rates(self.optimizer)
            self._totals.add(inputs, outputs, mode, self.state.global_step, scale)
        loss = outputs.loss * scale
        return (loss, outputs) if return_outputs else loss

    def note_outputs(self, inputs: dict[str, Any], outputs: DualSpeedOutput) -> None:
        """Note what a subclass logs of a micro-batch."""

    def _forget_order_of_calls(self) -> None:
        """Let ZeRO-3 expect no order of calls: fast steps, slow steps and recomputed layers differ in theirs.

        It would compare each micro-batch with the order of an earlier one, and may raise where they begin alike.
        """
        if self.sharding == ZERO3:
            engine: Any = self.model_wrapped
            coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
            if not coordinator.is_invalid_trace():
                coordinator._invalidate_trace()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; a training record also gets mean losses by mode, throughput and learning rates since the last one."""
        if "loss" in logs:
            logs |= self._totals.logs(self.accelerator) | self._learning_rates
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate in each mode of `eval_mode`, without an effect on training.

        Random states and throughput stay as they were. Metrics of fast mode begin with `<prefix>_fast_`.
        """
        if self._evaluated_mode is not None:  # one of a dict of datasets
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        metrics: dict[str, float] = {}
        started = time.perf_counter()
        with kept_random_state(self.args.device):
            try:
                for mode in self.eval_modes:
                    self._evaluated_mode = mode
                    prefix = metric_key_prefix + ("_fast" if mode is Mode.FAST else "")
                    metrics |= super().evaluate(eval_dataset, ignore_keys, prefix)
            finally:
                self._evaluated_mode = None
        seconds = time.perf_counter() - started
        self._totals.leave_out(seconds)
        self.evaluation_seconds += seconds
        return metrics

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss, logits and labels of a batch: (B, L, V) and (B, L), in fast mode of the shorter sequences."""
        inputs = self._without_image_labels(self._prepare_inputs(inputs))
        labels = inputs.get("labels")
        with torch.no_grad():
            num_items = self._get_num_items_in_batch([inputs], self.args.device)
            computed = self.compute_loss(model, inputs, not prediction_loss_only, num_items)
        loss, outputs = computed if isinstance(computed, tuple) else (computed, None)
        known = None if labels is None else loss.detach().mean()
        if outputs is None:
            return known, None, None
        seen = labels if outputs.labels is None else outputs.labels
        return known, outputs.logits.detach(), None if labels is None else seen

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the stock optimizer, with parameter groups for projector and vision tower."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new:
            inner: DualSpeedModel = self.accelerator.unwrap_model(
                self.model if model is None else model, keep_torch_compile=False
            )
            split_groups(optimizer, inner, self.learning_rates, self.get_decay_parameter_names(inner))
        return optimizer

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Stock estimate for ordinary training; else 0, since its formula counts the tokens that fast steps drop."""
        model = self.inner_model
        if model.dualspeed.slow_mode_ratio < 1:
            return 0
        return 6 * inputs["input_ids"].numel() * model.vlm.num_parameters(exclude_embeddings=True)


def learning_rates(optimizer: torch.optim.Optimizer | None) -> dict[str, float]:
    """Present learning rate of each parameter group, by the group's name or number; none before there are groups."""
    groups = optimizer.param_groups if optimizer else []
    return {f"learning_rate/{group.get('name', number)}": float(group["lr"]) for number, group in enumerate(groups)}
