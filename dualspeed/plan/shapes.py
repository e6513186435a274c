"""Sizes of a LLaVA model and the number of visual tokens of an image, by arithmetic, without the model."""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from dualspeed.errors import ConfigError
from dualspeed.settings.budget import num_tokens_to_keep
from dualspeed.settings.families import BASE_FAMILIES, LLAVA_NEXT_GRIDS, check_base_family, padded_vocabulary
from dualspeed.settings.model import ModelConfig
from dualspeed.settings.sources import Source, sources_of

LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32_000,
}
LLAMA_13B = LLAMA_7B | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}
CLIP_LARGE_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "image_size": 336,
    "patch_size": 14,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "lmsys/vicuna-7b-v1.5": LLAMA_7B,
    "lmsys/vicuna-13b-v1.5": LLAMA_13B | {"num_attention_heads": 40},
    "openai/clip-vit-large-patch14-336": {"vision_config": CLIP_LARGE_336},
    "llava-hf/llava-1.5-7b-hf": {"text_config": LLAMA_7B | {"vocab_size": 32_064}, "vision_config": CLIP_LARGE_336},
    "llava-hf/llava-v1.6-vicuna-7b-hf": {
        "text_config": LLAMA_7B | {"vocab_size": 32_064},
        "vision_config": CLIP_LARGE_336,
        "image_grid_pinpoints": LLAVA_NEXT_GRIDS,
    },
}
"""Sizes of checkpoints by their name on the Hub, for those that aren't downloaded yet."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a model that its costs follow from."""

    text_width: int
    """Hidden size of the language model."""
    text_inner: int
    """Intermediate size of its MLPs."""
    text_layers: int
    """Number of its blocks."""
    text_heads: int
    """Number of its attention heads."""
    text_kv_heads: int
    """Number of its key and value heads."""
    vocabulary: int
    """Rows of its embeddings."""
    vision_width: int
    """Hidden size of the vision tower."""
    vision_inner: int
    """Intermediate size of its MLPs."""
    vision_layers: int
    """Number of its blocks."""
    image_size: int
    """Pixels on a side of its input."""
    patch_size: int
    """Pixels on a side of a patch."""
    grids: tuple[tuple[int, int], ...] | None = None
    """Heights and widths, in pixels, that any-resolution images are fitted into; None: one tile an image."""

    @property
    def key_width(self) -> int:
        """Width of keys and values, less than `text_width` with grouped queries."""
        return self.text_width * self.text_kv_heads // self.text_heads

    @property
    def side(self) -> int:
        """Patches on a side of a tile."""
        return self.image_size // self.patch_size

    @property
    def layer_parameters(self) -> int:
        """Number of parameters in the linear layers of one block of the language model."""
        return 2 * self.text_width * (self.text_width + self.key_width) + 3 * self.text_width * self.text_inner

    @property
    def parameters(self) -> dict[str, int]:
        """Number of parameters of each part of the model: layers, embeddings, projector, vision."""
        width, vision = self.text_width, self.vision_width
        block = 4 * vision * (vision + 1) + 2 * vision * self.vision_inner + self.vision_inner + vision + 4 * vision
        embeddings = vision * (1 + 3 * self.patch_size**2 + self.side**2 + 1)
        return {
            "layers": self.text_layers * (self.layer_parameters + 2 * width),
            "embeddings": 2 * self.vocabulary * width + width,
            "projector": width * (vision + 1) + width * (width + 1) + (width if self.grids else 0),
            "vision": embeddings + self.vision_layers * block + 4 * vision,
        }

    def adapter_parameters(self, rank: int) -> int:
        """Number of parameters of LoRA adapters on the seven linear layers of each block."""
        inputs = 6 * self.text_width + self.text_inner
        outputs = 2 * (self.text_width + self.key_width) + 2 * self.text_inner + self.text_width
        return rank * (inputs + outputs) * self.text_layers

    def tiles(self, height: int, width: int) -> list[int]:
        """Tokens of each tile of an image, without the padding that LLaVA-NeXT removes; the base view comes first."""
        whole = self.side**2
        if self.grids is None:
            return [whole]
        rows, columns = (size // self.image_size for size in best_grid((height, width), self.grids))
        top, left = unpadded_margins(height, width, rows * self.side, columns * self.side)
        kept_rows, kept_columns = (
            [sum(margin <= place < total * self.side - margin for place in range(start, start + self.side))
             for start in range(0, total * self.side, self.side)]
            for margin, total in ((top, rows), (left, columns))
        )  # fmt: skip
        return [whole, *(a * b for a in kept_rows for b in kept_columns)]

    def newlines(self, height: int, width: int) -> int:
        """Newline tokens of an image, one at the end of each row of patches."""
        if self.grids is None:
            return 0
        rows, columns = (size // self.image_size for size in best_grid((height, width), self.grids))
        return rows * self.side - 2 * unpadded_margins(height, width, rows * self.side, columns * self.side)[0]

    def num_tiles(self, height: int, width: int) -> int:
        """Tiles of an image that the vision tower encodes, the base view and padded tiles included."""
        if self.grids is None:
            return 1
        return 1 + prod(size // self.image_size for size in best_grid((height, width), self.grids))

    def visual_tokens(self, height: int, width: int) -> int:
        """Visual tokens of an image before pruning."""
        return sum(self.tiles(height, width)) + self.newlines(height, width)

    def kept_tokens(self, height: int, width: int, ratio: float, num_virtual_tokens: int, budget: str) -> int:
        """Tokens of an image in fast mode, isolators included.

        Args:
            ratio: pruning ratio.
            num_virtual_tokens: isolator tokens of each pruned unit.
            budget: `tile` prunes each tile, `image` all tokens of the image at once.
        """
        units = self.tiles(height, width) if budget == "tile" else [self.visual_tokens(height, width)]
        return sum(num_tokens_to_keep(unit, ratio) + num_virtual_tokens for unit in units if unit)


def best_grid(size: tuple[int, int], grids: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """Grid that shows most pixels of an image of `size`, (height, width); among equals, the one with least padding."""

    def merit(grid: tuple[int, int]) -> tuple[int, int]:
        scale = min(grid[1] / size[1], grid[0] / size[0])
        shown = min(int(size[0] * scale) * int(size[1] * scale), prod(size))
        return shown, shown - prod(grid)

    return max(grids, key=merit)


def unpadded_margins(height: int, width: int, rows: int, columns: int) -> tuple[int, int]:
    """Padding of an image in a grid of rows x columns patches: rows at the top, and columns on the left."""
    if width / height > columns / rows:
        return (rows - int(round(height * (columns / width), 7))) // 2, 0
    return 0, (columns - int(round(width * (rows / height), 7))) // 2


def shape_of(model: ModelConfig, downloads: dict[str, Source]) -> ModelShape:
    """Sizes of a model of the configuration: from its files, or, before they are downloaded, by its name."""
    if model.parts is None:
        config = read_config(model.source, downloads)
        check_base_family(config, model.source)
        text, vision = config["text_config"], config["vision_config"]
        return make_shape(text, vision, text.get("vocab_size", 32_064), config.get("image_grid_pinpoints"))
    text = read_config(model.parts.language_model, downloads)
    vision = read_config(model.parts.vision_tower, downloads)
    vocabulary = padded_vocabulary(text["vocab_size"] + 2)
    grids = model.parts.image_grid_pinpoints or BASE_FAMILIES[model.parts.family].grids
    return make_shape(text, vision.get("vision_config", vision), vocabulary, grids)


def read_config(folder: str, downloads: dict[str, Source]) -> dict[str, Any]:
    """Content of a checkpoint's config.json; before it is downloaded, the sizes in PUBLISHED."""
    file = Path(folder) / "config.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    repos = [downloads[name].repo for name in sources_of(folder, downloads)]
    for repo in repos:
        if repo in PUBLISHED:
            return PUBLISHED[repo]
    raise ConfigError(
        f"{file}: missing, and the sizes of {', '.join(map(str, repos)) or 'its model'} are not known; "
        f"valid: download it first, or one of {', '.join(PUBLISHED)}"
    )


def make_shape(text: dict, vision: dict, vocabulary: int, grids: Any) -> ModelShape:
    """Sizes from configurations; missing keys have transformers' defaults, those of Llama-7B and CLIP-L-336."""
    text, vision = LLAMA_7B | text, CLIP_LARGE_336 | vision
    return ModelShape(
        text_width=text["hidden_size"],
        text_inner=text["intermediate_size"],
        text_layers=text["num_hidden_layers"],
        text_heads=text["num_attention_heads"],
        text_kv_heads=text.get("num_key_value_heads") or text["num_attention_heads"],
        vocabulary=vocabulary,
        vision_width=vision["hidden_size"],
        vision_inner=vision["intermediate_size"],
        vision_layers=vision["num_hidden_layers"],
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        grids=tuple(tuple(grid) for grid in grids) if grids else None,
    )
