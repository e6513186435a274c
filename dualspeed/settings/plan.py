"""What a plan assumes: the GPU, how much of it training reaches, and lengths of data that isn't prepared yet."""

from dataclasses import dataclass, field

from dualspeed.errors import ConfigError
from dualspeed.settings.reading import check_choice, check_range


@dataclass(frozen=True)
class Gpu:
    """A GPU as its maker states it."""

    name: str
    flops: float
    """Dense bfloat16 FLOPs a second."""
    memory: float
    """Bytes."""


GPUS = {
    "a100": Gpu("A100-80G", 312e12, 80e9),
    "h100": Gpu("H100-80G", 989e12, 80e9),
    "h200": Gpu("H200-141G", 989e12, 141e9),
}


@dataclass(frozen=True, kw_only=True)
class DatasetEstimate:
    """Lengths of a dataset, until it is prepared and they are counted."""

    samples: int
    """Rows that are trained on."""
    text_tokens: int
    """Tokens of a sample with an image, without those of the image."""
    supervised_tokens: int
    """How many of them are supervised."""
    image_share: float = 1.0
    """Share of the samples that have an image."""
    image_size: tuple[int, int] = (480, 640)
    """Height and width of a picture, which LLaVA-NeXT's tokens follow from."""
    text_only_tokens: int | None = None
    """Tokens of a sample without an image; null: as many as of the others' text."""
    longest_text_tokens: int | None = None
    """Tokens of the longest text, which memory follows from; null: as many as max_length has room for."""

    def __post_init__(self) -> None:
        for name in ("samples", "text_tokens", "supervised_tokens"):
            check_range(name, getattr(self, name), getattr(self, name) > 0, "above 0")
        check_range("image_share", self.image_share, 0 <= self.image_share <= 1, "in [0, 1]")
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise ConfigError(f"image_size: {self.image_size!r}; valid: height and width in pixels")


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """The block `plan` of a configuration."""

    gpu: str = "a100"
    """What training runs on: rows have to fit its memory."""
    utilisation: float = 0.4
    """Share of the peak FLOPs that training reaches."""
    datasets: dict[str, DatasetEstimate] = field(default_factory=dict)
    """By the `annotations` of the recipes that train on them."""

    def __post_init__(self) -> None:
        check_choice("gpu", self.gpu, GPUS)
        check_range("utilisation", self.utilisation, 0 < self.utilisation <= 1, "in (0, 1]")
