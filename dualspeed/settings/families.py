"""Facts about families of VLMs that need no torch: what configuration, plan, data and base models go by.

All that concerns modules and tensors is in dualspeed.method.vlm.families.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
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


class TowerKind(StrEnum):
    """Kind of a vision tower with its projector, by which `dualspeed plan` computes its cost."""

    SQUARE = "square"
    """CLIP on square tiles, two products for each patch."""
    SHUFFLED = "shuffled"
    """SigLIP on square tiles, one product for each square of patches."""
    WINDOWS = "windows"
    """Any resolution, attention within windows, a merger."""
    DEEPSTACK = "deepstack"
    """Any resolution, attention to the whole image, mergers behind several layers."""


TOWER_KINDS = {
    "llava": TowerKind.SQUARE,
    "llava_next": TowerKind.SQUARE,
    "idefics3": TowerKind.SHUFFLED,
    "smolvlm": TowerKind.SHUFFLED,
    "qwen2_5_vl": TowerKind.WINDOWS,
    "qwen3_vl": TowerKind.DEEPSTACK,
}
"""model_type -> kind of its tower, of the families whose costs are known."""


def tower_kind(config: Mapping[str, Any], source: str) -> TowerKind:
    """Kind of the tower of a checkpoint, by its configuration; ConfigError if its costs aren't known.

    Args:
        source: the checkpoint's folder.
    """
    kind = config.get("model_type", "llava")
    if kind not in TOWER_KINDS:
        raise ConfigError(f"{source}: costs follow from the sizes of {' or '.join(TOWER_KINDS)}, and this is {kind!r}")
    return TOWER_KINDS[kind]


def aspect_ratios_of(processor: str) -> tuple[str, ...]:
    """Values of `image_aspect_ratio` for a processor of this class name; none for families without such a choice."""
    return next((family.aspect_ratios for family in BASE_FAMILIES.values() if family.processor == processor), ())


def padded_vocabulary(num_tokens: int) -> int:
    """`num_tokens` rounded up to a multiple of VOCABULARY_MULTIPLE."""
    return -(-num_tokens // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
