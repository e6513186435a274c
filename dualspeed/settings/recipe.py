"""The recipe of a training stage: its data and its `transformers.TrainingArguments`, by a global batch size."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from dualspeed.chat_templates import TEMPLATE_NAMES
from dualspeed.errors import ConfigError
from dualspeed.settings.reading import check_choice, check_range
from dualspeed.settings.training_arguments import check_training_arguments

IMAGE_ASPECT_RATIOS = ("anyres", "pad", "square")
"""LLaVA's names: `square` crops the middle, `pad` adds borders, `anyres` cuts tiles beside a view of the whole."""


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """What preparing a stage's data needs."""

    annotations: str
    """LLaVA conversation JSON."""
    images: str
    """Folder that the annotations' image paths start from."""
    chat_template: str = "vicuna_v1"
    """Prompt format; its generation blocks are what is supervised."""
    max_length: int = 2048
    """Tokens of a sample, image tokens included; a longer text is cut at its end."""
    max_dropped_share: float = 0.05
    """Preparation fails if a larger share of the samples is unusable."""
    image_aspect_ratio: str | None = None
    """How a picture becomes the tower's square, or its squares; null: as the checkpoint's processor has it."""
    validation_annotations: str | None = None
    """Held-out conversations, in the same format and with images in the same folder; null: no validation."""

    def __post_init__(self) -> None:
        if self.image_aspect_ratio is not None:
            check_choice("image_aspect_ratio", self.image_aspect_ratio, IMAGE_ASPECT_RATIOS)
        check_choice("chat_template", self.chat_template, TEMPLATE_NAMES)
        check_range("max_length", self.max_length, self.max_length > 0, "above 0")
        check_range("max_dropped_share", self.max_dropped_share, 0 <= self.max_dropped_share <= 1, "in [0, 1]")
        if self.validation_annotations == self.annotations:
            raise ConfigError(f"validation_annotations: {self.annotations!r} is trained on; valid: another file")

    def to_dict(self) -> dict[str, Any]:
        """JSON form, without a validation where none is asked: what was made before there was that choice stays."""
        settings = dataclasses.asdict(self)
        if self.validation_annotations is None:
            return {key: value for key, value in settings.items() if not key.startswith("validation_")}
        return settings


@dataclass(frozen=True, kw_only=True)
class LoraRecipe:
    """Adapters on the language model instead of training it in full; the defaults are LLaVA's."""

    rank: int = 128
    """Rank of the adapters."""
    alpha: int = 256
    """Their product is scaled by alpha / rank."""
    dropout: float = 0.05
    """Dropout on their input."""
    quantize: bool = False
    """QLoRA: hold the model itself in 4 bits."""

    def __post_init__(self) -> None:
        check_range("lora.rank", self.rank, self.rank > 0, "above 0")
        check_range("lora.alpha", self.alpha, self.alpha > 0, "above 0")
        check_range("lora.dropout", self.dropout, 0 <= self.dropout < 1, "in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class Recipe(DataRecipe):
    """One stage of training: its data and its `transformers.TrainingArguments`."""

    global_batch_size: int
    """Samples of one optimizer step, over all devices and accumulation steps."""
    per_device_batch_size: int | None = None
    """Samples that a device takes at once; null: all of its share of the batch."""
    slow_per_device_batch_size: int | None = None
    """The same in slow steps, which need more memory a sample; null: as many as in fast ones."""
    projector_learning_rate: float | None = None
    """Learning rate of projector and isolator; null: that of everything else."""
    vision_learning_rate: float | None = None
    """Learning rate of the vision tower; null: it stays frozen."""
    lora: LoraRecipe | None = None
    """Finetune adapters; null: the whole language model."""
    validation_steps: int | None = None
    """Optimizer steps from one validation to the next."""
    accelerate_config: str | None = None
    """File for `accelerate launch`: how many processes, and how they share the model; null: one process."""
    training_arguments: dict[str, Any] = field(default_factory=dict)
    """Fields of TrainingArguments; batch sizes, seed and folders are set elsewhere."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("global_batch_size", self.global_batch_size, self.global_batch_size > 0, "above 0")
        if self.per_device_batch_size is not None:
            batch_plan(self.global_batch_size, 1, self.per_device_batch_size)
        if (slow := self.slow_per_device_batch_size) is not None:
            fast = self.per_device_batch_size or self.global_batch_size
            valid = f"from 1 to the samples of a fast step, {fast}, or null"
            check_range("slow_per_device_batch_size", slow, 0 < slow <= fast, valid)
        if (self.validation_annotations is None) != (self.validation_steps is None):
            given = f"{self.validation_steps!r} with validation_annotations {self.validation_annotations!r}"
            raise ConfigError(f"validation_steps: {given}; valid: both or neither")
        if self.validation_steps is not None:
            check_range("validation_steps", self.validation_steps, self.validation_steps > 0, "above 0")
        for name in ("projector_learning_rate", "vision_learning_rate"):
            rate = getattr(self, name)
            check_range(name, rate or 0.0, rate is None or rate >= 0, "0 or more, or null")
        check_training_arguments(self.training_arguments)

    def preparation(self) -> DataRecipe:
        """The part that preparing the data depends on."""
        return DataRecipe(**{field.name: getattr(self, field.name) for field in dataclasses.fields(DataRecipe)})


def batch_plan(global_batch_size: int, num_processes: int, per_device_batch_size: int) -> int:
    """Accumulation steps that make `global_batch_size` on this many processes; ConfigError if they don't divide it."""
    samples_at_once = num_processes * per_device_batch_size
    valid = f"a multiple of {num_processes} devices x {per_device_batch_size} samples"
    is_valid = samples_at_once > 0 and global_batch_size % samples_at_once == 0
    check_range("global_batch_size", global_batch_size, is_valid, valid)
    return global_batch_size // samples_at_once
