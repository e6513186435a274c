"""Strategies that share a model among processes, read from a file for `accelerate launch`, and the recipes they fit."""

import json
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dualspeed.errors import ConfigError
from dualspeed.settings.reading import check_choice, read_value
from dualspeed.settings.recipe import Recipe
from dualspeed.settings.yaml_file import read_yaml

DDP, FSDP2, ZERO2, ZERO3 = SHARDINGS = ("ddp", "fsdp2", "zero2", "zero3")
BLOCKS = {"FSDP": "fsdp_config", "DEEPSPEED": "deepspeed_config"}
"""Kind of distribution -> its block in the file."""
WITHOUT_SHARDS = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU", "MULTI_MLU", "MULTI_HPU", "MULTI_MUSA")
STATE_DICTS = ("SHARDED_STATE_DICT", "FULL_STATE_DICT")
BY_RECIPE = {
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "per_device_batch_size",
    "gradient_accumulation_steps": "global_batch_size",
    "gradient_clipping": "training_arguments.max_grad_norm",
}
"""DeepSpeed's setting -> what says it in a recipe."""


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How training processes share a model."""

    strategy: str = DDP
    """One of SHARDINGS."""
    file: str = ""
    """File that says so; empty: none, each process holds the whole model."""
    has_whole_checkpoints: bool = False
    """True if FSDP2 writes its checkpoints whole rather than in shards."""
    mixed_precision: str | None = None
    """Dtype of arithmetic that the file asks for; None: the recipe says it."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """DeepSpeed's settings."""

    @property
    def name(self) -> str:
        """Name of the kind of checkpoints: those of one kind can't be read by another."""
        return self.strategy + (" (FULL_STATE_DICT)" if self.has_whole_checkpoints else "")


def read_sharding(file: str | None) -> Sharding:
    """Strategy of a file for `accelerate launch`; ConfigError if it is unknown, or contradicts itself."""
    if file is None:
        return Sharding()
    launcher = read_value(dict[str, Any], read_yaml(Path(file)), file, "top level")
    kind = launcher.get("distributed_type", "NO")
    check_choice(f"{file}: distributed_type", kind, (*BLOCKS, *WITHOUT_SHARDS))
    for other, block in BLOCKS.items():
        if kind != other and launcher.get(block):
            raise ConfigError(
                f"{file}: {block}: has no effect with distributed_type {kind}; valid: {other}, or no block"
            )
    settings = read_value(dict[str, Any], launcher.get(BLOCKS.get(kind, "")) or {}, file, BLOCKS.get(kind, ""))
    precision = launcher.get("mixed_precision")
    if kind == "FSDP":
        return _fsdp(file, settings, precision)
    if kind == "DEEPSPEED":
        return _deepspeed(file, settings, precision)
    return Sharding(file=file, mixed_precision=precision)


def _fsdp(file: str, settings: dict[str, Any], precision: str | None) -> Sharding:
    version = settings.get("fsdp_version", 1)
    if version != 2:
        raise ConfigError(f"{file}: fsdp_config.fsdp_version: {version!r}; valid: 2")
    kind = settings.get("fsdp_state_dict_type", STATE_DICTS[0])
    check_choice(f"{file}: fsdp_config.fsdp_state_dict_type", kind, STATE_DICTS)
    return Sharding(
        strategy=FSDP2, file=file, has_whole_checkpoints=kind == "FULL_STATE_DICT", mixed_precision=precision
    )


def _deepspeed(file: str, settings: dict[str, Any], precision: str | None) -> Sharding:
    place, zero, gathers = f"{file}: deepspeed_config", settings, settings.get("zero3_save_16bit_model", False)
    stage_key, deepspeed = "zero_stage", {}
    if "deepspeed_config_file" in settings:
        place, stage_key = str(settings["deepspeed_config_file"]), "stage"
        deepspeed = read_deepspeed(Path(place))
        zero = read_value(dict[str, Any], deepspeed.get("zero_optimization", {}), place, "zero_optimization")
        gathers = zero.get("stage3_gather_16bit_weights_on_model_save", False)
    stage = zero.get(stage_key)
    if stage not in (2, 3):
        raise ConfigError(f"{place}: {stage_key} of ZeRO: {stage!r}; valid: 2 or 3")
    if stage == 3 and not gathers:
        key = "zero3_save_16bit_model" if stage_key == "zero_stage" else "stage3_gather_16bit_weights_on_model_save"
        raise ConfigError(f"{place}: {key}: {gathers!r}, so that the trained model could not be saved; valid: true")
    return Sharding(strategy=f"zero{stage}", file=file, mixed_precision=precision, deepspeed=deepspeed)


def read_deepspeed(file: Path) -> dict[str, Any]:
    """DeepSpeed's settings; ConfigError if the file is missing, or holds no JSON object."""
    try:
        return read_value(dict[str, Any], json.loads(file.read_text(encoding="utf-8-sig")), str(file), "top level")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{file}: {error}; valid: DeepSpeed's settings as JSON") from None


def check_fit(sharding: Sharding, recipe: Recipe) -> None:
    """Raise ConfigError if a recipe can't be trained by this strategy."""
    arguments, file = recipe.training_arguments, sharding.file
    precision = next((name for name in ("bf16", "fp16") if arguments.get(name)), "no")
    if sharding.mixed_precision not in (None, precision):
        raise ConfigError(
            f"{file}: mixed_precision: {sharding.mixed_precision!r}, but the recipe's training_arguments ask for "
            f"{precision}; valid: {precision}, or no such line"
        )
    if sharding.strategy in (FSDP2, ZERO3) and recipe.lora is not None and recipe.lora.quantize:
        raise ConfigError(f"lora.quantize: 4-bit weights are not sharded by {file}; valid: DDP or ZeRO-2, or false")
    if sharding.strategy in (ZERO2, ZERO3):
        check_deepspeed_fit(sharding, recipe, precision)


def check_deepspeed_fit(sharding: Sharding, recipe: Recipe, precision: str) -> None:
    """Raise ConfigError if DeepSpeed is missing, or has settings that are the recipe's, or that contradict it."""
    file, settings = sharding.file, sharding.deepspeed
    if find_spec("deepspeed") is None:
        raise ConfigError(f"{file}: needs DeepSpeed; valid: pip install --no-build-isolation deepspeed, or fsdp2.yaml")
    for name in ("slow_per_device_batch_size", "tokens_per_batch"):
        if (value := getattr(recipe, name)) is not None:
            raise ConfigError(
                f"{name}: {value}, but DeepSpeed ({file}) counts micro-batches itself; valid: null, or FSDP2"
            )
    for key in ("optimizer", "scheduler"):
        if key in settings:
            raise ConfigError(
                f"{file}: DeepSpeed's {key}: the recipe's training_arguments set it; valid: no such block"
            )
    for key, source in BY_RECIPE.items():
        if settings.get(key, "auto") != "auto":
            raise ConfigError(
                f"{file}: DeepSpeed's {key}: {settings[key]!r}; valid: auto, as the recipe's {source} sets it"
            )
    for name in ("bf16", "fp16"):
        enabled = settings.get(name, {}).get("enabled", "auto" if name in settings else False)
        if enabled != "auto" and bool(enabled) != (precision == name):
            raise ConfigError(
                f"{file}: DeepSpeed's {name}.enabled: {enabled!r}, but the recipe's training_arguments ask for "
                f"{precision}; valid: auto"
            )
