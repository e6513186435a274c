"""The recipe of a training stage: its data and its `transformers.TrainingArguments`, by a global batch size."""

import dataclasses
import os.path
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dualspeed.chat_templates import AUTO, TEMPLATE_NAMES
from dualspeed.errors import ConfigError
from dualspeed.settings.attention import ATTENTION, check_reads_lengths
from dualspeed.settings.data_source import DataSource
from dualspeed.settings.fields import check_fields, choice, number
from dualspeed.settings.identity import DECIDES_NOTHING
from dualspeed.settings.reading import check_range
from dualspeed.settings.training_arguments import check_training_arguments

IMAGE_ASPECT_RATIOS = ("anyres", "pad", "square")
"""LLaVA's names: `square` crops the middle, `pad` adds borders, `anyres` cuts tiles beside a view of the whole."""
PARQUET_SUFFIXES = ("", ".parquet")
"""Suffixes of annotations that hold their images: folders and files of parquet."""
MAX_IMAGE_PIXELS = 178_956_970
"""Largest image; from here on Pillow itself takes a file for an attack on memory."""


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """Settings that the preparation of a stage's data depends on."""

    annotations: str = ""
    """LLaVA conversation JSON; empty where `data` says what is read."""
    images: str = ""
    """Folder that image paths start from; with `data`, of the sources that name none, and of held-out conversations."""
    data: tuple[DataSource, ...] = ()
    """Instead of `annotations`: sources of rows in any format, one after another."""
    chat_template: str = choice((AUTO, *TEMPLATE_NAMES), default="vicuna_v1")
    """Prompt format. `auto`: the model's own, which is the default where `source` is the folder of a checkpoint."""
    max_length: int = number(above=0, default=2048)
    """Tokens of a sample, image tokens included; a longer text is cut at its end."""
    max_dropped_share: float = number(minimum=0, maximum=1, default=0.05)
    """Preparation fails if a larger share of the samples is unusable."""
    image_aspect_ratio: str | None = choice(IMAGE_ASPECT_RATIOS, default=None)
    """Way to fit an image into the tower's square tiles; null: as the checkpoint's processor does it."""
    validation_annotations: str | None = None
    """Held-out conversations, in the same format and with images in the same folder; null: no validation."""
    max_image_pixels: int = number(above=0, default=MAX_IMAGE_PIXELS)
    """Largest image in pixels; larger ones are unusable."""

    def __post_init__(self) -> None:
        check_fields(self)
        if bool(self.annotations) == bool(self.data):
            seen = f"{self.annotations!r} with {len(self.data)} sources of data" if self.data else "missing"
            raise ConfigError(f"annotations: {seen}; valid: LLaVA conversations, or `data`, a list of sources")
        if not self.images and (self.annotations or self.validation_annotations is not None):
            raise ConfigError("images: missing; valid: the folder that image paths start from")
        trained_on = [self.annotations] if self.annotations else [source.path for source in self.data if source.path]
        for path in trained_on:
            if self.validation_annotations is not None and is_shared(self.validation_annotations, path):
                valid = f"valid: another file or folder, beside {path!r}"
                raise ConfigError(f"validation_annotations: {self.validation_annotations!r} is trained on; {valid}")

    @property
    def data_name(self) -> str:
        """Name of the data in messages, and in `plan.datasets`: the path of the annotations, or the sources' names."""
        return self.annotations or " + ".join(source.name for source in self.data)

    def images_of(self, source: DataSource) -> str | None:
        """Folder that a source's image paths start from; None: they are taken as they are."""
        return source.images or self.images or None


def is_shared(one: str, other: str) -> bool:
    """True if two paths are the same, or one is parquet inside the other: a folder stands for all parquet below it."""
    first, second = (Path(os.path.abspath(path)) for path in (one, other))
    inside = [inner for inner, outer in ((first, second), (second, first)) if inner.is_relative_to(outer)]
    return any(path.suffix in PARQUET_SUFFIXES for path in inside) or first == second


@dataclass(frozen=True, kw_only=True)
class LoraRecipe:
    """Adapters on the language model instead of training it in full; the defaults are LLaVA's."""

    rank: int = number(above=0, default=128)
    """Rank of the adapters."""
    alpha: int = number(above=0, default=256)
    """Their product is scaled by alpha / rank."""
    dropout: float = number(minimum=0, below=1, default=0.05)
    """Dropout on their input."""
    quantize: bool = False
    """QLoRA: hold the model itself in 4 bits."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class Recipe(DataRecipe):
    """One stage of training: its data and its `transformers.TrainingArguments`."""

    global_batch_size: int = number(above=0)
    """Samples of one optimizer step, over all devices and accumulation steps."""
    per_device_batch_size: int | None = number(above=0, default=None)
    """Samples of a micro-batch on each device; null: no gradient accumulation."""
    slow_per_device_batch_size: int | None = number(above=0, default=None)
    """The same in slow steps, which need more memory a sample; null: as many as in fast ones."""
    tokens_per_batch: int | None = number(above=0, default=None)
    """Instead of samples: most tokens of a micro-batch on each device, padding included; in fast steps, pruned ones."""
    slow_tokens_per_batch: int | None = number(above=0, default=None)
    """The same in slow steps; null: tokens_per_batch."""
    attn_implementation: str | None = choice(ATTENTION, default=None)
    """Implementation of the language model's attention, in transformers' names; null: its choice."""
    packing: bool = False
    """Join the rows of a micro-batch behind one another, without padding; needs flash or flex attention."""
    projector_learning_rate: float | None = number(minimum=0, default=None)
    """Learning rate of projector and isolator; null: that of everything else."""
    vision_learning_rate: float | None = number(minimum=0, default=None)
    """Learning rate of the vision tower; null: it stays frozen."""
    lora: LoraRecipe | None = None
    """Finetune adapters; null: the whole language model."""
    validation_steps: int | None = number(above=0, default=None)
    """Optimizer steps from one validation to the next."""
    accelerate_config: str | None = field(default=None, metadata=DECIDES_NOTHING)
    """File for `accelerate launch`: how many processes, and how they share the model; null: one process."""
    cache_features: str | None = field(default=None, metadata=DECIDES_NOTHING)
    """Folder that keeps what the frozen vision tower makes of each image; null: the tower runs in every step."""
    training_arguments: dict[str, Any] = field(default_factory=dict)
    """Fields of TrainingArguments; batch sizes, seed and folders are set elsewhere."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per_device_batch_size is not None:
            batch_plan(self.global_batch_size, 1, self.per_device_batch_size)
        if (slow := self.slow_per_device_batch_size) is not None:
            fast = self.per_device_batch_size or self.global_batch_size
            valid = f"from 1 to the samples of a fast step, {fast}, or null"
            check_range("slow_per_device_batch_size", slow, 0 < slow <= fast, valid)
        self._check_tokens_per_batch()
        if self.packing:
            check_reads_lengths(self.attn_implementation)
        if (self.validation_annotations is None) != (self.validation_steps is None):
            given = f"{self.validation_steps!r} with validation_annotations {self.validation_annotations!r}"
            raise ConfigError(f"validation_steps: {given}; valid: both or neither")
        if self.cache_features is not None and self.vision_learning_rate is not None:
            rate = f"with vision_learning_rate {self.vision_learning_rate:g} the tower's features change"
            raise ConfigError(f"cache_features: {self.cache_features!r}, but {rate}; valid: one of both")
        check_training_arguments(self.training_arguments)

    def _check_tokens_per_batch(self) -> None:
        """Raise ConfigError for settings that contradict tokens_per_batch, or have no effect."""
        if self.tokens_per_batch is None:
            if self.slow_tokens_per_batch is not None:
                raise ConfigError("slow_tokens_per_batch: has no effect without tokens_per_batch; valid: both, or null")
            return
        for name in ("per_device_batch_size", "slow_per_device_batch_size"):
            if (value := getattr(self, name)) is not None:
                raise ConfigError(f"{name}: {value}, but tokens_per_batch decides; valid: null, or no tokens_per_batch")
        if self.training_arguments.get("train_sampling_strategy") == "batch_rebalance":
            raise ConfigError(
                "training_arguments.train_sampling_strategy: 'batch_rebalance' divides steps by full lengths, beside "
                "tokens_per_batch; valid: 'group_by_length', 'random' or 'sequential'"
            )

    @property
    def token_budgets(self) -> dict[str, int]:
        """Most tokens of a micro-batch of `fast` and of `slow` steps; empty without tokens_per_batch."""
        if self.tokens_per_batch is None:
            return {}
        return {"fast": self.tokens_per_batch, "slow": self.slow_tokens_per_batch or self.tokens_per_batch}

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
