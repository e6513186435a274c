"""Checks of a trainer's arguments, at its construction: what can't work together is refused with the reason."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import TrainingArguments

from dualspeed.errors import ConfigError
from dualspeed.settings.method import DualSpeedConfig
from dualspeed.settings.modes import Mode

LAYERWISE = ("lomo", "adalomo")
"""Optimizers that update inside the backward pass, by one learning rate for all."""
LIGERS_FORWARD = "fused_linear_cross_entropy"
"""Setting of liger_kernel_config that replaces the model's forward."""


def named_arguments(constructor: Callable, positional: Sequence[Any], named: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a trainer's constructor behind model and args, by name."""
    return inspect.signature(constructor).bind_partial(None, None, *positional, **named).arguments


def eval_modes_of(name: str) -> tuple[Mode, ...]:
    """Modes of an `eval_mode`; ConfigError names the valid ones."""
    modes = {"slow": (Mode.SLOW,), "fast": (Mode.FAST,), "both": (Mode.SLOW, Mode.FAST)}
    if name not in modes:
        raise ConfigError(f"eval_mode: {name!r} is unknown; valid: {', '.join(modes)}")
    return modes[name]


def set_defaults(args: TrainingArguments) -> None:
    """Set what the method needs where the stock default is another: what its models and batches are like."""
    args.remove_unused_columns = False  # columns are inputs of the collator, not of the model
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False  # every parameter is in the graph of every step
    if args.accelerator_config.dispatch_batches is None:
        # Else accelerate collates batches of iterable datasets on one process and cuts them up by samples, while
        # pixel_values has a row an image, or a patch.
        args.accelerator_config.dispatch_batches = False
    if args.use_liger_kernel:
        # Its fused loss would take the place of the forward through which pruned image features enter.
        args.liger_kernel_config = {LIGERS_FORWARD: False} | (args.liger_kernel_config or {})


def check_arguments(
    args: TrainingArguments,
    dualspeed: DualSpeedConfig,
    rates: Mapping[str, float | None],
    trainer_arguments: Mapping[str, Any],
) -> None:
    """Raise ConfigError for arguments that contradict each other or have no effect.

    Args:
        rates: learning rate of each part that can have its own.
        trainer_arguments: arguments of the stock trainer's constructor, by name.
    """
    _check_optimizer(args, dualspeed, rates, trainer_arguments)
    if args.use_liger_kernel and args.liger_kernel_config.get(LIGERS_FORWARD):
        raise ConfigError(
            f"liger_kernel_config: {LIGERS_FORWARD} replaces the forward through which pruned image features enter; "
            f"valid: {LIGERS_FORWARD}: False"
        )
    if args.accelerator_config.dispatch_batches:
        raise ConfigError(
            "accelerator_config: dispatch_batches=True collates batches on one process and cuts them up by samples, "
            "while pixel_values has a row an image, or a patch; valid: None or False"
        )
    if trainer_arguments.get("compute_loss_func") is not None:
        if args.label_smoothing_factor:
            raise ConfigError("label_smoothing_factor: has no effect beside compute_loss_func; valid: 0")
        if dualspeed.distillation_weight > 0 and dualspeed.slow_mode_ratio > 0:
            raise ConfigError(
                "compute_loss_func: distillation is part of the loss of slow steps, and would be added to it; valid: "
                "DualSpeedConfig(distillation_weight=0), or no compute_loss_func"
            )
    if args.parallelism_config is not None:
        raise ConfigError(
            "parallelism_config: sequences and layers cut up over ranks don't go with pruning; valid: None, with "
            "DDP, FSDP or DeepSpeed to share the work"
        )
    if args.n_gpu > 1:
        raise ConfigError(
            f"{args.n_gpu} GPUs in one process: nn.DataParallel cuts batches up by samples, and pixel_values has a row "
            "an image; valid: one process a GPU (torchrun or accelerate launch), or one visible GPU"
        )


def _check_optimizer(
    args: TrainingArguments,
    dualspeed: DualSpeedConfig,
    rates: Mapping[str, float | None],
    trainer_arguments: Mapping[str, Any],
) -> None:
    """Raise ConfigError for learning rates without effect, and for updates inside the backward pass."""
    asked = [f"{part}_learning_rate" for part, rate in rates.items() if rate is not None]
    own_optimizer = (trainer_arguments.get("optimizers") or (None,))[0] is not None
    if asked and own_optimizer:
        raise ConfigError(f"{asked[0]}: has no effect on the optimizer in `optimizers`; set it in its parameter groups")
    optim = str(getattr(args.optim, "value", args.optim))
    if optim in LAYERWISE or optim.endswith("_layerwise"):
        if asked:
            raise ConfigError(f"{asked[0]}: optim {optim!r} has one learning rate for all parameters; valid: None")
        if dualspeed.num_virtual_tokens and 0 < dualspeed.slow_mode_ratio < 1:
            raise ConfigError(
                f"optim: {optim!r} updates inside the backward pass, and so would move the isolator in slow steps; "
                f"valid: {optim.removesuffix('_layerwise') if optim not in LAYERWISE else 'adamw_torch'!r}, or "
                "DualSpeedConfig(num_virtual_tokens=0)"
            )


def check_dtypes(model: nn.Module, mixed_precision: str, is_deepspeed_enabled: bool) -> None:
    """Raise ConfigError for weights of several dtypes without mixed precision, which would fail in the first step."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if len(dtypes) > 1 and mixed_precision == "no" and not is_deepspeed_enabled:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ConfigError(
            f"the weights are in {names}, which only mixed precision can train; valid: bf16=True in the training "
            "arguments, or all weights in one dtype (from_pretrained(dtype='float32'))"
        )
