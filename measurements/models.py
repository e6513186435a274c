"""Models with random weights in real shapes, and batches like their training batches."""

from dataclasses import dataclass

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
)

from dualspeed.device import best_device

IMAGE_TOKEN, PAD_TOKEN = 3, 0
PATCH = 14


@dataclass(frozen=True)
class Size:
    """Shape of a model and of its batches."""

    text: dict[str, int]
    vision: dict[str, int]
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
        slow_batch_size=2,
        text_tokens=60,
        spread=0.15,
        supervised=30,
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
    """LLaVA-1.5, or LLaVA-NeXT with four tiles and a base tile per image, with random weights."""
    device = best_device()
    torch.manual_seed(0)
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


def batch_of(size: Size) -> dict[str, torch.Tensor]:
    """One global batch: an image per sample, text before and after it, the answer at the end."""
    device = best_device()
    generator = torch.Generator().manual_seed(0)
    row_length = size.side // PATCH
    # A square image in four tiles: the base tile, and rows that end with a newline token.
    num_visual = row_length**2 + (2 * row_length * (2 * row_length + 1) if size.has_tiles else 0)
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
    tiles = (5,) if size.has_tiles else ()
    pixels = torch.randn(size.batch_size, *tiles, 3, size.side, size.side, generator=generator)
    batch = {
        "input_ids": input_ids,
        "attention_mask": (input_ids != PAD_TOKEN).long(),
        "labels": labels,
        "pixel_values": pixels.to(size.dtype),
    }
    if size.has_tiles:
        batch["image_sizes"] = torch.full((size.batch_size, 2), 2 * size.side)
    return {name: values.to(device) for name, values in batch.items()}
