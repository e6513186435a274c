"""Sizes of a LLaVA, and how many visual tokens it makes of a picture; all by arithmetic, without the model."""

import json
from dataclasses import dataclass
from math import floor, prod
from pathlib import Path
from typing import Any

from dualspeed.errors import ConfigError
from dualspeed.settings.model import LLAVA_NEXT_GRIDS, ModelConfig
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
"""Sizes of what isn't downloaded yet, by its name on the Hub."""
VOCABULARY_MULTIPLE = 64


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes that costs follow from. D width of the language model, C of the vision tower."""

    text_width: int
    text_inner: int
    text_layers: int
    text_heads: int
    text_kv_heads: int
    vocabulary: int
    vision_width: int
    vision_inner: int
    vision_layers: int
    image_size: int
    patch_size: int
    grids: tuple[tuple[int, int], ...] | None = None
    """Heights and widths that LLaVA-NeXT fits pictures into; None: one square a picture."""

    @property
    def key_width(self) -> int:
        """Width of keys and values, narrower than D with grouped queries."""
        return self.text_width * self.text_kv_heads // self.text_heads

    @property
    def side(self) -> int:
        """Patches on a side of the tower's square."""
        return self.image_size // self.patch_size

    @property
    def layer_parameters(self) -> int:
        """Parameters of the linear layers of one block of the language model."""
        return 2 * self.text_width * (self.text_width + self.key_width) + 3 * self.text_width * self.text_inner

    @property
    def parameters(self) -> dict[str, int]:
        """Parameters of each part of the model."""
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
        """Parameters of LoRA's adapters on the seven linear layers of each block."""
        inputs = 6 * self.text_width + self.text_inner
        outputs = 2 * (self.text_width + self.key_width) + 2 * self.text_inner + self.text_width
        return rank * (inputs + outputs) * self.text_layers

    def tiles(self, height: int, width: int) -> list[int]:
        """Tokens of each of a picture's tiles, without what LLaVA-NeXT takes off as padding; the whole view first."""
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
        """Tokens that end the rows of a picture's tiles."""
        if self.grids is None:
            return 0
        rows, columns = (size // self.image_size for size in best_grid((height, width), self.grids))
        return rows * self.side - 2 * unpadded_margins(height, width, rows * self.side, columns * self.side)[0]

    def num_tiles(self, height: int, width: int) -> int:
        """Squares that the vision tower encodes of a picture, padding or not."""
        if self.grids is None:
            return 1
        return 1 + prod(size // self.image_size for size in best_grid((height, width), self.grids))

    def visual_tokens(self, height: int, width: int) -> int:
        """Tokens of a picture in full mode."""
        return sum(self.tiles(height, width)) + self.newlines(height, width)

    def kept_tokens(self, height: int, width: int, ratio: float, num_virtual_tokens: int, budget: str) -> int:
        """Tokens of a picture in fast mode, isolators included."""
        units = self.tiles(height, width) if budget == "tile" else [self.visual_tokens(height, width)]
        return sum(max(1, floor((1 - ratio) * unit + 1e-6)) + num_virtual_tokens for unit in units if unit)


def best_grid(size: tuple[int, int], grids: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The grid that shows most of a picture of (height, width), and of those the one that wastes least."""

    def merit(grid: tuple[int, int]) -> tuple[int, int]:
        scale = min(grid[1] / size[1], grid[0] / size[0])
        shown = min(int(size[0] * scale) * int(size[1] * scale), prod(size))
        return shown, shown - prod(grid)

    return max(grids, key=merit)


def unpadded_margins(height: int, width: int, rows: int, columns: int) -> tuple[int, int]:
    """Rows at top and bottom, and columns at either side, that hold nothing of the picture."""
    if width / height > columns / rows:
        return (rows - int(round(height * (columns / width), 7))) // 2, 0
    return 0, (columns - int(round(width * (rows / height), 7))) // 2


def shape_of(model: ModelConfig, downloads: dict[str, Source]) -> ModelShape:
    """Sizes of a model of the configuration: from its files, or of what will be downloaded by its name."""
    if model.parts is None:
        config = read_config(model.source, downloads)
        text, vision = config["text_config"], config["vision_config"]
        return make_shape(text, vision, text.get("vocab_size", 32_064), config.get("image_grid_pinpoints"))
    text = read_config(model.parts.language_model, downloads)
    vision = read_config(model.parts.vision_tower, downloads)
    vocabulary = -(-(text["vocab_size"] + 2) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    grids = (model.parts.image_grid_pinpoints or LLAVA_NEXT_GRIDS) if model.parts.family == "llava_next" else None
    return make_shape(text, vision.get("vision_config", vision), vocabulary, grids)


def read_config(folder: str, downloads: dict[str, Source]) -> dict[str, Any]:
    """config.json of a checkpoint, or the sizes that are known by the name of what is downloaded there."""
    file = Path(folder) / "config.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    repos = [downloads[name].repo for name in sources_of(folder, downloads)]
    for repo in repos:
        if repo in PUBLISHED:
            return PUBLISHED[repo]
    raise ConfigError(
        f"{file}: not there yet, and the sizes of {', '.join(map(str, repos)) or 'what belongs there'} aren't known; "
        f"valid: download it first, or one of {', '.join(PUBLISHED)}"
    )


def make_shape(text: dict, vision: dict, vocabulary: int, grids: Any) -> ModelShape:
    """Sizes from configurations; what they leave out is as transformers takes it: Llama-7B's and CLIP-L-336's."""
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
