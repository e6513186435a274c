"""Sizes of published checkpoints, for those that aren't downloaded yet, and transformers' defaults of keys."""

from dataclasses import dataclass, field
from typing import Any

from dualspeed.settings.families import LLAVA_NEXT_GRIDS, TowerKind

LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32_000,
}
LLAMA_13B = LLAMA_7B | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}
QWEN2_5_72B = {
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 152_064,
}
QWEN2_5_3B = {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
}
QWEN3 = {
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "vocab_size": 151_936,
}
QWEN3_4B = QWEN3 | {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
}
SMOLLM2_135M = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_280,
}
CLIP_LARGE_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "image_size": 336,
    "patch_size": 14,
}
SIGLIP_SHUFFLED = {
    "hidden_size": 1152,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "image_size": 224,
    "patch_size": 32,
}
WINDOWED = {
    "hidden_size": 3584,
    "intermediate_size": 3420,
    "depth": 32,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
DEEPSTACK = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "depth": 27,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}
DEEPSTACK_4B = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "depth": 24,
    "deepstack_visual_indexes": [5, 11, 17],
    "out_hidden_size": 2560,
}

TEXT_DEFAULTS = {
    TowerKind.SQUARE: LLAMA_7B,
    TowerKind.SHUFFLED: LLAMA_7B,
    TowerKind.WINDOWS: QWEN2_5_72B,
    TowerKind.DEEPSTACK: QWEN3,
}
VISION_DEFAULTS = {
    TowerKind.SQUARE: CLIP_LARGE_336,
    TowerKind.SHUFFLED: SIGLIP_SHUFFLED,
    TowerKind.WINDOWS: WINDOWED,
    TowerKind.DEEPSTACK: DEEPSTACK,
}
"""Values that transformers takes for the keys that a configuration leaves out."""
IMAGE_DEFAULTS: dict[TowerKind, dict[str, Any]] = {
    TowerKind.SQUARE: {},
    TowerKind.SHUFFLED: {"size": {"longest_edge": 4 * 364}},
    TowerKind.WINDOWS: {"size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}},
    TowerKind.DEEPSTACK: {"size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}},
}
"""The same for image processors."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Sizes of a VLM, as its checkpoint says them."""

    kind: TowerKind
    """Kind of its vision tower."""
    config: dict[str, Any]
    """Content of config.json."""
    images: dict[str, Any] = field(default_factory=dict)
    """Settings of its image processor."""


PARTS: dict[str, dict[str, Any]] = {
    "lmsys/vicuna-7b-v1.5": LLAMA_7B,
    "lmsys/vicuna-13b-v1.5": LLAMA_13B | {"num_attention_heads": 40},
    "openai/clip-vit-large-patch14-336": {"vision_config": CLIP_LARGE_336},
}
"""config.json of language models and towers that a VLM is assembled from."""
VLMS = {
    "llava-hf/llava-1.5-7b-hf": Checkpoint(
        kind=TowerKind.SQUARE,
        config={"text_config": LLAMA_7B | {"vocab_size": 32_064}, "vision_config": CLIP_LARGE_336},
    ),
    "llava-hf/llava-v1.6-vicuna-7b-hf": Checkpoint(
        kind=TowerKind.SQUARE,
        config={
            "text_config": LLAMA_7B | {"vocab_size": 32_064},
            "vision_config": CLIP_LARGE_336,
            "image_grid_pinpoints": LLAVA_NEXT_GRIDS,
        },
    ),
    "Qwen/Qwen2.5-VL-3B-Instruct": Checkpoint(
        kind=TowerKind.WINDOWS,
        config=QWEN2_5_3B
        | {"tie_word_embeddings": True, "vision_config": {"hidden_size": 1280, "out_hidden_size": 2048}},
        images={"min_pixels": 3136, "max_pixels": 12_845_056},
    ),
    "Qwen/Qwen3-VL-4B-Instruct": Checkpoint(
        kind=TowerKind.DEEPSTACK,
        config={"tie_word_embeddings": True, "text_config": QWEN3_4B, "vision_config": DEEPSTACK_4B},
        images={"size": {"shortest_edge": 256 * 256, "longest_edge": 4096 * 4096}},
    ),
    "HuggingFaceTB/SmolVLM-256M-Instruct": Checkpoint(
        kind=TowerKind.SHUFFLED,
        config={
            "scale_factor": 4,
            "text_config": SMOLLM2_135M,
            "vision_config": {"hidden_size": 768, "image_size": 512, "patch_size": 16},
        },
        images={"size": {"longest_edge": 2048}},
    ),
}
"""Checkpoints of whole VLMs."""
