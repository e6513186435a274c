"""Sizes of a VLM and the number of visual tokens of an image, by arithmetic, without the model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualspeed.errors import ConfigError
from dualspeed.plan.published import IMAGE_DEFAULTS, PARTS, TEXT_DEFAULTS, VISION_DEFAULTS, VLMS, Checkpoint
from dualspeed.plan.resolution_towers import DeepStackTower, WindowTower
from dualspeed.plan.towers import Encoded, ShuffledTower, SquareTower, Tower
from dualspeed.settings.budget import num_tokens_to_keep
from dualspeed.settings.families import BASE_FAMILIES, TowerKind, padded_vocabulary, tower_kind
from dualspeed.settings.model import ModelConfig
from dualspeed.settings.sources import Source, sources_of


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
    head_width: int
    """Width of a head of queries, keys or values."""
    vocabulary: int
    """Rows of its embeddings."""
    has_bias: bool = False
    """True if its queries, keys and values have biases."""
    has_head_norms: bool = False
    """True if heads of queries and of keys are normed."""
    ties_embeddings: bool = False
    """True if its head is its embeddings."""
    tower: Tower
    """Its vision tower with the projector."""

    @property
    def query_width(self) -> int:
        """Width of queries and of attention's output, which need not be `text_width`."""
        return self.text_heads * self.head_width

    @property
    def key_width(self) -> int:
        """Width of keys and values, less than `query_width` with grouped queries."""
        return self.text_kv_heads * self.head_width

    @property
    def layer_parameters(self) -> int:
        """Number of parameters in the linear layers of one block of the language model, without biases."""
        return 2 * self.text_width * (self.query_width + self.key_width) + 3 * self.text_width * self.text_inner

    @property
    def parameters(self) -> dict[str, int]:
        """Number of parameters of each part of the model: layers, embeddings, projector, vision."""
        width = self.text_width
        biases = self.query_width + 2 * self.key_width if self.has_bias else 0
        norms = 2 * width + (2 * self.head_width if self.has_head_norms else 0)
        return {
            "layers": self.text_layers * (self.layer_parameters + biases + norms),
            "embeddings": (1 if self.ties_embeddings else 2) * self.vocabulary * width + width,
            "projector": self.tower.projector_parameters(width),
            "vision": self.tower.parameters,
        }

    def adapter_parameters(self, rank: int) -> int:
        """Number of parameters of LoRA adapters on the seven linear layers of each block."""
        inputs = 5 * self.text_width + self.query_width + self.text_inner
        outputs = self.query_width + 2 * self.key_width + 2 * self.text_width + 2 * self.text_inner
        return rank * (inputs + outputs) * self.text_layers

    def visual_tokens(self, height: int, width: int) -> int:
        """Visual tokens of an image before pruning."""
        return sum(self.tower.units(height, width, "image"))

    def kept_tokens(self, height: int, width: int, ratio: float, num_virtual_tokens: int, budget: str) -> int:
        """Tokens of an image in fast mode, isolators included.

        Args:
            ratio: pruning ratio.
            num_virtual_tokens: isolator tokens of each pruned unit.
            budget: `tile` prunes each tile, `image` all tokens of the image at once.
        """
        units = self.tower.units(height, width, budget)
        return sum(num_tokens_to_keep(unit, ratio) + num_virtual_tokens for unit in units if unit)

    def encoded(self, height: int, width: int) -> Encoded:
        """Cost of encoding an image."""
        return self.tower.encoded(height, width, self.text_width)


def shape_of(model: ModelConfig, downloads: dict[str, Source]) -> ModelShape:
    """Sizes of a model of the configuration: from its files, or, before they are downloaded, by its name."""
    if model.parts is None:
        return shape_of_vlm(read_vlm(model.source, downloads))
    text = read_part(model.parts.language_model, downloads)
    vision = read_part(model.parts.vision_tower, downloads)
    vocabulary = padded_vocabulary(text["vocab_size"] + 2)
    grids = model.parts.image_grid_pinpoints or BASE_FAMILIES[model.parts.family].grids
    return make_shape(text, vision.get("vision_config", vision), vocabulary, grids)


def read_vlm(folder: str, downloads: dict[str, Source]) -> Checkpoint:
    """Sizes of a VLM as its files say them, or, before they are downloaded, as published."""
    config = read_json(Path(folder) / "config.json")
    if config is None:
        return VLMS[published(folder, downloads, VLMS)]
    processor = read_json(Path(folder) / "processor_config.json") or {}
    images = processor.get("image_processor") or read_json(Path(folder) / "preprocessor_config.json") or {}
    return Checkpoint(kind=tower_kind(config, folder), config=config, images=images)


def read_part(folder: str, downloads: dict[str, Source]) -> dict[str, Any]:
    """Content of the config.json of a part; before it is downloaded, the published sizes."""
    return read_json(Path(folder) / "config.json") or PARTS[published(folder, downloads, PARTS)]


def read_json(file: Path) -> dict[str, Any] | None:
    """Content of a JSON file; None if it isn't there."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def published(folder: str, downloads: dict[str, Source], known: dict[str, Any]) -> str:
    """Name on the Hub, one in `known`, of what is downloaded to a folder."""
    repos = [downloads[name].repo for name in sources_of(folder, downloads)]
    for repo in repos:
        if repo in known:
            return repo
    raise ConfigError(
        f"{folder}/config.json: missing, and the sizes of {', '.join(map(str, repos)) or 'its model'} are not known; "
        f"valid: download it first, or one of {', '.join(known)}"
    )


def make_shape(text: dict[str, Any], vision: dict[str, Any], vocabulary: int, grids: Any) -> ModelShape:
    """Sizes of a LLaVA from the configurations of its language model and tower; missing keys have their defaults."""
    return shape_of_vlm(
        Checkpoint(
            kind=TowerKind.SQUARE,
            config={
                "text_config": text | {"vocab_size": vocabulary},
                "vision_config": vision,
                "image_grid_pinpoints": grids,
            },
        )
    )


def shape_of_vlm(checkpoint: Checkpoint) -> ModelShape:
    """Sizes of a VLM. Older configurations hold the language model's keys themselves; missing keys have defaults."""
    config, kind = checkpoint.config, checkpoint.kind
    text = TEXT_DEFAULTS[kind] | config.get("text_config", config)
    return ModelShape(
        text_width=text["hidden_size"],
        text_inner=text["intermediate_size"],
        text_layers=text["num_hidden_layers"],
        text_heads=text["num_attention_heads"],
        text_kv_heads=text.get("num_key_value_heads") or text["num_attention_heads"],
        head_width=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
        vocabulary=text["vocab_size"],
        has_bias=kind is TowerKind.WINDOWS,
        has_head_norms=kind is TowerKind.DEEPSTACK,
        ties_embeddings=bool(config.get("tie_word_embeddings")),
        tower=tower_of(checkpoint),
    )


def tower_of(checkpoint: Checkpoint) -> Tower:
    """Tower of a VLM, with what its image processor makes of an image."""
    config, kind = checkpoint.config, checkpoint.kind
    vision = VISION_DEFAULTS[kind] | config.get("vision_config", {})
    images = IMAGE_DEFAULTS[kind] | checkpoint.images
    sizes = {"width": vision["hidden_size"], "inner": vision["intermediate_size"], "patch_size": vision["patch_size"]}
    if kind in (TowerKind.WINDOWS, TowerKind.DEEPSTACK):
        return resolution_tower(kind, sizes | {"layers": vision["depth"]}, vision, images)
    square = sizes | {"layers": vision["num_hidden_layers"], "image_size": vision["image_size"]}
    if kind is TowerKind.SHUFFLED:
        longest = images["size"]["longest_edge"]
        return ShuffledTower(**square, factor=config.get("scale_factor", 2), longest_edge=longest)
    grids = config.get("image_grid_pinpoints")
    return SquareTower(**square, grids=tuple(tuple(grid) for grid in grids) if grids else None)


def resolution_tower(
    kind: TowerKind, sizes: dict[str, int], vision: dict[str, Any], images: dict[str, Any]
) -> WindowTower | DeepStackTower:
    """Tower of a VLM that takes images of any resolution.

    Args:
        sizes: arguments that all towers have.
        vision: configuration of the tower, complete.
        images: settings of the image processor; older ones have keys of their own for what is `size` now.
    """
    least = images.get("min_pixels") or images["size"]["shortest_edge"]
    most = images.get("max_pixels") or images["size"]["longest_edge"]
    merge, frames = vision["spatial_merge_size"], vision["temporal_patch_size"]
    if kind is TowerKind.DEEPSTACK:
        return DeepStackTower(
            **sizes,
            merge=merge,
            pixels=(least, most),
            frames=frames,
            positions=vision["num_position_embeddings"],
            deep_layers=tuple(vision["deepstack_visual_indexes"]),
        )
    return WindowTower(
        **sizes,
        merge=merge,
        pixels=(least, most),
        frames=frames,
        window=vision["window_size"],
        full_layers=len([layer for layer in vision["fullatt_block_indexes"] if layer < vision["depth"]]),
    )
