"""Models of measurements/gpu.py: random weights in the shapes of four checkpoints, made on the device, and batches."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from dualspeed.method.model import DualSpeedModel
from dualspeed.settings.budget import num_tokens_to_keep
from dualspeed.settings.method import DualSpeedConfig
from dualspeed.training.trainable import hold_trained_weights_in_float32, set_trainable
from measurements.gpu_device import autocasts
from measurements.models import CLIP_L, VICUNA

PRUNING_RATIO, ISOLATOR_TOKENS = 0.9, 4
IMAGE_TOKEN, PAD_TOKEN, FIRST_WORD = 3, 0, 10
TEXT_TOKENS, SPREAD, SUPERVISED_SHARE = 130, 0.6, 0.6
"""Mean number of text tokens of a sample and the standard deviation of its logarithm, roughly those of instruction
data, and the share of them that is supervised."""
LORA_RANK = 128


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a checkpoint, and of the global batch that a step trains on."""

    config: str
    """Name of the configuration's class in transformers; the model's class follows from it."""
    text: dict[str, Any]
    vision: dict[str, Any]
    visual_tokens: int
    """Visual tokens of an image, without newlines."""
    samples: int = 8
    """Samples of a global batch; a fast step takes them at once."""
    full_samples: int = 4
    """Samples of a micro-batch on all tokens."""
    text_tokens: int = TEXT_TOKENS
    vocabulary: int = 32_064
    tiles: int = 1
    """Tiles of an image, the base tile included."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further settings of the configuration."""

    @property
    def depth(self) -> int:
        """Number of the language model's layers."""
        return self.text["num_hidden_layers"]


QWEN25_TEXT = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}
QWEN3_TEXT = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
}
QWEN_TOKENS = {"video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
CLIP_336 = CLIP_L | {"image_size": 336, "patch_size": 14}
REAL = {
    "LLaVA-1.5-7B": Shape(
        config="LlavaConfig", text=VICUNA, vision=CLIP_336, visual_tokens=576, samples=16, full_samples=8
    ),
    "LLaVA-NeXT-7B": Shape(
        config="LlavaNextConfig",
        text=VICUNA,
        vision=CLIP_336,
        visual_tokens=2880,
        tiles=5,
        options={"image_grid_pinpoints": [[672, 672]]},
    ),
    "Qwen2.5-VL-7B": Shape(
        config="Qwen2_5_VLConfig",
        text=QWEN25_TEXT,
        vision={"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584},
        visual_tokens=1024,
        vocabulary=152_064,
        options=QWEN_TOKENS,
    ),
    "Qwen3-VL-8B": Shape(
        config="Qwen3VLConfig",
        text=QWEN3_TEXT,
        vision={"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 4096},
        visual_tokens=1024,
        vocabulary=151_936,
        options=QWEN_TOKENS,
    ),
}


def toy(shape: Shape) -> Shape:
    """Shape of the same family with small numbers, which a CPU trains in a fraction of a second."""
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 4, "head_dim": 8}
    if "rope_parameters" in shape.text:
        text["rope_parameters"] = shape.text["rope_parameters"] | {"mrope_section": [1, 1, 2]}
    if "depth" in shape.vision:
        vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32}
        vision |= {"fullatt_block_indexes": [1]} if shape.config == "Qwen2_5_VLConfig" else {}
        vision |= {"deepstack_visual_indexes": [0, 1]} if shape.config == "Qwen3VLConfig" else {}
        options = shape.options
    else:
        vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
        vision |= {"image_size": 56, "patch_size": 14}
        options = {"image_grid_pinpoints": [[112, 112]]} if shape.tiles > 1 else {}
    return dataclasses.replace(
        shape,
        text=text,
        vision=vision,
        visual_tokens=16 * shape.tiles,
        samples=2,
        full_samples=1,
        text_tokens=20,
        vocabulary=64,
        options=options,
    )


def build(shape: Shape, depth: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """Model with random weights, made on the device, with this number of layers in its language model."""
    config_class = getattr(transformers, shape.config)
    text = shape.text | {"num_hidden_layers": depth, "vocab_size": shape.vocabulary, "pad_token_id": PAD_TOKEN}
    # transformers' configurations take the text's as a dict, and LLaVA's have to be told its kind.
    text |= {} if "rope_parameters" in shape.text else {"model_type": "llama", "max_position_embeddings": 4096}
    vision = shape.vision if "depth" in shape.vision else shape.vision | {"model_type": "clip_vision_model"}
    config = config_class(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        tie_word_embeddings=False,
        **shape.options,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype)


class LowRank(nn.Module):
    """Linear layer with frozen weights and a trained product of two thin matrices beside them (LoRA)."""

    def __init__(self, frozen: nn.Linear, rank: int) -> None:
        super().__init__()
        self.frozen = frozen
        weight = frozen.weight
        like = {"device": weight.device, "dtype": torch.float32 if autocasts(weight.device) else weight.dtype}
        self.down = nn.Parameter(torch.randn(rank, frozen.in_features, **like) / frozen.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(frozen.out_features, rank, **like))

    def forward(self, inputs: Tensor) -> Tensor:
        """Sum of both paths."""
        return self.frozen(inputs) + nn.functional.linear(nn.functional.linear(inputs, self.down), self.up)


def trained_model(vlm: PreTrainedModel, kind: str, is_tiled: bool) -> DualSpeedModel:
    """Model that trains as a finetuning does: trained weights in float32, frozen ones in bfloat16.

    A device without autocast trains in bfloat16.

    Args:
        kind: `full` trains the whole language model; `LoRA` trains adapters of LORA_RANK on its linear layers, written
            out here because peft may be missing.
        is_tiled: True for images in tiles, each of which is pruned by itself, as in config/paper.
    """
    model = DualSpeedModel(
        vlm, DualSpeedConfig(pruning_ratio=PRUNING_RATIO, prune_budget="tile" if is_tiled else "image")
    )
    set_trainable(model, "pretrain" if kind == "LoRA" else "finetune")
    if kind == "LoRA":
        add_low_rank(model)
    if autocasts(model.device):
        hold_trained_weights_in_float32(model)
    model.activation_checkpointing_enable()
    return model.train()


def add_low_rank(model: DualSpeedModel) -> None:
    """Put adapters on every linear layer of the language model's blocks."""
    for layer in model.vlm.get_decoder().layers:
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                parent = layer.get_submodule(name.rpartition(".")[0])
                setattr(parent, name.rpartition(".")[2], LowRank(module, adapter_rank(module)))


def adapter_rank(layer: nn.Linear) -> int:
    """Rank of a layer's adapter: LORA_RANK in real shapes, thin in toy ones too."""
    return min(LORA_RANK, layer.in_features // 8)


def batch_of(shape: Shape, device: torch.device, samples: int | None = None) -> dict[str, Tensor]:
    """One batch as the collator makes it: an image in each sample, text around it, the answer at the end."""
    samples = samples or shape.samples
    generator = torch.Generator().manual_seed(0)
    scale = torch.exp(SPREAD * torch.randn(samples, generator=generator) - SPREAD**2 / 2)
    texts = (shape.text_tokens * scale).long().clamp(min=12).tolist()
    pixels, placeholders = image_inputs(shape, samples, generator)
    length = max(texts) + placeholders
    input_ids = torch.full((samples, length), PAD_TOKEN)
    labels = torch.full_like(input_ids, -100)
    for row, text in enumerate(texts):
        end = text + placeholders
        input_ids[row, :end] = torch.randint(FIRST_WORD, shape.vocabulary, (end,), generator=generator)
        input_ids[row, 4 : 4 + placeholders] = IMAGE_TOKEN
        answer = slice(end - int(text * SUPERVISED_SHARE), end)
        labels[row, answer] = input_ids[row, answer]
    batch = {"input_ids": input_ids, "attention_mask": (input_ids != PAD_TOKEN).long(), "labels": labels} | pixels
    return {name: values.to(device) for name, values in batch.items()}


def image_inputs(shape: Shape, samples: int, generator: torch.Generator) -> tuple[dict[str, Tensor], int]:
    """Inputs of the vision tower for one square image a sample, and the placeholders of an image."""
    if "image_size" not in shape.vision:
        patch, merged = shape.vision.get("patch_size", 16 if shape.config == "Qwen3VLConfig" else 14), 2
        side = merged * math.isqrt(shape.visual_tokens)
        rows = torch.randn(samples * side**2, 3 * 2 * patch**2, generator=generator).to(torch.bfloat16)
        return {"pixel_values": rows, "image_grid_thw": torch.tensor([[1, side, side]] * samples)}, shape.visual_tokens
    pixels = smooth_pictures(samples * shape.tiles, shape.vision["image_size"], generator).to(torch.bfloat16)
    if shape.tiles == 1:
        return {"pixel_values": pixels}, shape.visual_tokens
    per_row = math.isqrt(shape.tiles - 1) * shape.vision["image_size"] // shape.vision["patch_size"]
    sizes = torch.full((samples, 2), math.isqrt(shape.tiles - 1) * shape.vision["image_size"])
    # Each row of the large image ends with a newline token.
    tiled = {"pixel_values": pixels.unflatten(0, (samples, shape.tiles)), "image_sizes": sizes}
    return tiled, shape.visual_tokens + per_row


def smooth_pictures(count: int, side: int, generator: torch.Generator) -> Tensor:
    """(count, 3, side, side) random pictures whose neighbouring pixels are alike, with mean 0 and deviation near 1."""
    coarse = torch.randn(count, 3, max(2, side // 16), max(2, side // 16), generator=generator)
    return nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")


def sample_lengths(shape: Shape, batch: dict[str, Tensor]) -> list[tuple[int, int, int]]:
    """Tokens on full tokens, tokens in fast mode, and supervised tokens of each sample of a batch."""
    full = batch["attention_mask"].sum(dim=1).tolist()
    visual = (batch["input_ids"] == IMAGE_TOKEN).sum(dim=1).tolist()
    supervised = (batch["labels"] != -100).sum(dim=1).tolist()
    per_tile = num_tokens_to_keep(shape.visual_tokens // shape.tiles, PRUNING_RATIO) + ISOLATOR_TOKENS
    fast = [total - image + shape.tiles * per_tile for total, image in zip(full, visual, strict=True)]
    return list(zip(full, fast, supervised, strict=True))
