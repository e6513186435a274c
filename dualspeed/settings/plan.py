"""Assumptions of a plan: GPU, share of its FLOPs that training reaches, lengths of data that isn't prepared yet."""

from dataclasses import dataclass, field

from dualspeed.errors import ConfigError
from dualspeed.settings.fields import check_fields, choice, number


@dataclass(frozen=True)
class Gpu:
    """A GPU as its maker states it."""

    name: str
    flops: float
    """Dense bfloat16 FLOPs a second."""
    memory: float
    """Bytes."""


GPUS = {
    "rtx4090": Gpu("RTX4090-24G", 165e12, 24e9),
    "a100": Gpu("A100-80G", 312e12, 80e9),
    "a100-40g": Gpu("A100-40G", 312e12, 40e9),
    "h100": Gpu("H100-80G", 989e12, 80e9),
    "h200": Gpu("H200-141G", 989e12, 141e9),
}


@dataclass(frozen=True, kw_only=True)
class DatasetEstimate:
    """Lengths of a dataset, until it is prepared and they are counted."""

    samples: int = number(above=0)
    """Rows that are trained on."""
    text_tokens: int = number(above=0)
    """Tokens of a sample with an image, without those of the image."""
    supervised_tokens: int = number(above=0)
    """Supervised ones among `text_tokens`."""
    image_share: float = number(minimum=0, maximum=1, default=1.0)
    """Share of the samples that have an image."""
    image_size: tuple[int, int] = (480, 640)
    """Height and width of a picture, which the tokens follow from, except LLaVA's."""
    largest_image_size: tuple[int, int] | None = None
    """Height and width of the largest picture, which memory follows from where a family takes any size, as Qwen-VL
    does; null: `image_size`."""
    text_only_tokens: int | None = number(above=0, default=None)
    """Tokens of a sample without an image; null: as many as of the others' text."""
    longest_text_tokens: int | None = number(above=0, default=None)
    """Tokens of the longest text, which memory follows from; null: as many as max_length has room for."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("image_size", "largest_image_size"):
            size = getattr(self, name)
            if size is not None and (len(size) != 2 or min(size) < 1):
                raise ConfigError(f"{name}: {size!r}; valid: height and width in pixels")


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """The block `plan` of a configuration."""

    gpu: str = choice(GPUS, default="a100")
    """GPU that training runs on; rows have to fit its memory."""
    utilisation: float = number(above=0, maximum=1, default=0.4)
    """Share of the peak FLOPs that training reaches."""
    datasets: dict[str, DatasetEstimate] = field(default_factory=dict)
    """By the `annotations` of the recipes that train on them."""

    def __post_init__(self) -> None:
        check_fields(self)
