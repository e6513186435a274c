"""Models with random weights in real shapes, and batches like their training batches."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from dualspeed.device import best_device

IMAGE_TOKEN, PAD_TOKEN = 3, 0
PATCH = 14


@dataclass(frozen=True)
class Size:
    """Shape of a model and of its batches."""

    text: dict[str, Any]
    vision: dict[str, Any]
    batch_size: int
    fast_batch_size: int
    """Micro-batch size of fast steps."""
    baseline_batch_size: int
    """Micro-batch size of steps on full tokens."""
    slow_batch_size: int
    """Micro-batch size of slow steps, which hold logits of teacher and student at once."""
    text_tokens: int
    """Mean number of text tokens; lengths are log-normal, roughly as in instruction data."""
    spread: float
    """Standard deviation of the logarithm of the lengths."""
    supervised: int
    """Mean number of supervised tokens."""
    has_tiles: bool = False
    side: int = 336
    """Side of a tile in pixels."""
    grid: int = 0
    """Squares of patches, visual tokens that is, on a side of a picture of a Qwen3-VL; 0: a LLaVA."""
    vocabulary: int = 32_000
    dtype: torch.dtype = torch.float32


VICUNA = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
REAL = {"batch_size": 16, "text_tokens": 130, "spread": 0.6, "supervised": 80, "dtype": torch.bfloat16}
MODELS = {
    "small": Size(
        text={"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 8},
        vision={"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4},
        batch_size=8,
        fast_batch_size=8,
        baseline_batch_size=4,
        slow_batch_size=4,
        text_tokens=60,
        spread=0.15,
        supervised=30,
    ),
    # The tower's share of a fast step's FLOPs is that of Qwen3-VL-4B with 1,024 visual tokens (37 %).
    "small-qwen3-vl": Size(
        text={
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [12, 10, 10]},
        },
        vision={
            "hidden_size": 192,
            "intermediate_size": 768,
            "depth": 4,
            "num_heads": 6,
            "out_hidden_size": 512,
            "deepstack_visual_indexes": [1],
        },
        batch_size=4,
        fast_batch_size=4,
        baseline_batch_size=2,
        slow_batch_size=2,
        text_tokens=60,
        spread=0.15,
        supervised=30,
        grid=16,
        vocabulary=4_000,
    ),
    "llava-1.5-7b": Size(
        text=VICUNA, vision=CLIP_L, fast_batch_size=4, baseline_batch_size=4, slow_batch_size=4, **REAL
    ),
    "llava-next-7b": Size(
        text=VICUNA,
        vision=CLIP_L,
        fast_batch_size=2,
        baseline_batch_size=2,
        slow_batch_size=2,
        has_tiles=True,
        **REAL,
    ),
}


def build(size: Size) -> PreTrainedModel:
    """LLaVA-1.5, LLaVA-NeXT with four tiles and a base tile per image, or Qwen3-VL, with random weights."""
    device = best_device()
    torch.manual_seed(0)
    if size.grid:
        return build_qwen(size).to(device, size.dtype)
    vision = CLIPVisionConfig(**size.vision, image_size=size.side, patch_size=PATCH)
    text = LlamaConfig(**size.text, vocab_size=size.vocabulary, pad_token_id=PAD_TOKEN, max_position_embeddings=4096)
    config, model = (
        (LlavaNextConfig, LlavaNextForConditionalGeneration)
        if size.has_tiles
        else (LlavaConfig, LlavaForConditionalGeneration)
    )
    pinpoints = {"image_grid_pinpoints": [[2 * size.side] * 2]} if size.has_tiles else {}
    with torch.device(device):
        return model(config(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, **pinpoints)).to(
            size.dtype
        )


def build_qwen(size: Size) -> PreTrainedModel:
    """Qwen3-VL with random weights."""
    text = size.text | {"vocab_size": size.vocabulary, "pad_token_id": PAD_TOKEN}
    others = {"video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
    config = Qwen3VLConfig(text_config=text, vision_config=size.vision, image_token_id=IMAGE_TOKEN, **others)
    return Qwen3VLForConditionalGeneration(config)


def pictures_of_squares(size: Size, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Inputs of Qwen3-VL's tower: pictures whose upper half is noise and whose lower half is even.

    Half of their squares, all but one in the lower half, are predicted by their neighbours.
    """
    merged, patch_values = 2, 3 * 2 * 16**2
    noise = torch.randn(size.batch_size, size.grid**2 // 2 * merged**2, patch_values, generator=generator)
    pixels = torch.cat([noise, torch.full_like(noise, 0.5)], dim=1).flatten(0, 1).to(size.dtype)
    grid = [1, merged * size.grid, merged * size.grid]
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([grid] * size.batch_size)}


def batch_of(size: Size) -> dict[str, torch.Tensor]:
    """One global batch: an image per sample, text before and after it, the answer at the end."""
    device = best_device()
    generator = torch.Generator().manual_seed(0)
    row_length = size.side // PATCH
    # A square image in four tiles: the base tile, and rows that end with a newline token.
    num_visual = row_length**2 + (2 * row_length * (2 * row_length + 1) if size.has_tiles else 0)
    num_visual = size.grid**2 or num_visual
    scale = torch.exp(size.spread * torch.randn(size.batch_size, generator=generator) - size.spread**2 / 2)
    texts = (size.text_tokens * scale).long().clamp(min=16)
    answers = (texts * size.supervised / size.text_tokens).long()
    length = int(texts.max()) + num_visual
    input_ids = torch.full((size.batch_size, length), PAD_TOKEN)
    labels = torch.full_like(input_ids, -100)
    for row, (text, answer) in enumerate(zip(texts.tolist(), answers.tolist(), strict=True)):
        end = text + num_visual
        input_ids[row, :end] = torch.randint(10, size.vocabulary, (end,), generator=generator)
        input_ids[row, 4 : 4 + num_visual] = IMAGE_TOKEN
        labels[row, end - answer : end] = input_ids[row, end - answer : end]
    batch = {
        "input_ids": input_ids,
        "attention_mask": (input_ids != PAD_TOKEN).long(),
        "labels": labels,
    }
    if size.grid:
        batch |= pictures_of_squares(size, generator)
    else:
        tiles = (5,) if size.has_tiles else ()
        pixels = torch.randn(size.batch_size, *tiles, 3, size.side, size.side, generator=generator)
        batch["pixel_values"] = pixels.to(size.dtype)
    if size.has_tiles:
        batch["image_sizes"] = torch.full((size.batch_size, 2), 2 * size.side)
    return {name: values.to(device) for name, values in batch.items()}
