"""Facts about families of VLMs that need no torch: what configuration, plan, data and base models go by.

All that concerns modules and tensors is in dualspeed.method.vlm.families.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dualspeed.errors import ConfigError

LLAVA_NEXT_GRIDS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
"""Height and width of LLaVA-NeXT's any-resolution images, for a tower of 336 pixels."""
VOCABULARY_MULTIPLE = 64
"""Vocabularies are padded to a multiple of this, for faster matrix products."""
TABLE_PROCESSORS = ("CLIPImageProcessorPil", "LlavaImageProcessorPil")
"""Class names of image processors whose last two steps rescale and normalise one (3, H, W) array per image."""


@dataclass(frozen=True, kw_only=True)
class BaseFamily:
    """Family that base models are assembled for."""

    processor: str
    """Class name of its processor."""
    aspect_ratios: tuple[str, ...]
    """Values of `image_aspect_ratio` that its processor can follow."""
    grids: tuple[tuple[int, int], ...] | None = None
    """Height and width of the grids that images are fitted into by default; None: one square tile an image."""


BASE_FAMILIES = {
    "llava": BaseFamily(processor="LlavaProcessor", aspect_ratios=("pad", "square")),
    "llava_next": BaseFamily(processor="LlavaNextProcessor", aspect_ratios=("anyres",), grids=LLAVA_NEXT_GRIDS),
}
"""model_type -> family."""


def check_base_family(config: Mapping[str, Any], source: str) -> None:
    """Raise ConfigError unless a checkpoint's configuration is one of BASE_FAMILIES, whose costs are known.

    Args:
        source: the checkpoint's folder.
    """
    kind = config.get("model_type", "llava")
    if kind not in BASE_FAMILIES:
        raise ConfigError(
            f"{source}: costs follow from the sizes of {' or '.join(BASE_FAMILIES)}, and this is {kind!r}"
        )


def aspect_ratios_of(processor: str) -> tuple[str, ...]:
    """Values of `image_aspect_ratio` for a processor of this class name; none for families without such a choice."""
    return next((family.aspect_ratios for family in BASE_FAMILIES.values() if family.processor == processor), ())


def padded_vocabulary(num_tokens: int) -> int:
    """`num_tokens` rounded up to a multiple of VOCABULARY_MULTIPLE."""
    return -(-num_tokens // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
