"""The demo's base model: a tiny LLaVA in stock classes, made in minutes as large ones are made in weeks.

Two trainings (dualspeed.demo.base_training): the vision tower on labelled patches (then frozen, like CLIP), and
language model with projector on captions of and questions about excerpts of pictures. That is what stands in for a
large model's instruction tuning; whole pictures are left to the rows of the sheet. Enters: the demo's data folder.
Leaves: a checkpoint with its processor, in the Hub's parameter names.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dualspeed.base_models.hub_names import save_with_hub_names
from dualspeed.demo.base_training import (
    caption_texts,
    conversation_texts,
    encode_images,
    load_pixels,
    patch_labels,
    train_language_model,
    train_vision_tower,
)
from dualspeed.demo.drawing import CELL, GRID
from dualspeed.demo.tokenizer import make_tokenizer
from dualspeed.settings.demo import BaseModelSettings, settings_from_dict

IMAGE_SIZE = GRID * CELL


def make_base_model(settings: dict[str, Any], data: Path, out: Path) -> None:
    """Train the base model on `data` (see dualspeed.demo.scenes) and write it to folder `out`, whole or not at all.

    Raises:
        ValueError: unknown or impossible setting.
    """
    chosen = settings_from_dict(BaseModelSettings, settings)
    torch.manual_seed(chosen.seed)
    processor = make_processor(make_tokenizer())
    model = build_model(chosen, processor.tokenizer)

    scenes = json.loads((data / "scenes.json").read_text())[: chosen.num_scenes]
    pixels = load_pixels([data / "images" / "train" / scene["image"] for scene in scenes], processor)
    train_vision_tower(model.model.vision_tower, chosen, pixels, scenes)
    features = encode_images(model.model.vision_tower, pixels)
    captions = caption_texts(processor.tokenizer, one_a_picture(data / "pretrain.json", scenes))
    conversations = conversation_texts(processor, one_a_picture(data / "finetune.json", scenes))
    train_language_model(model, chosen, features, captions, conversations, patch_labels(scenes)[1] > 0)
    save_with_hub_names(model, processor, out)


def one_a_picture(file: Path, scenes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first record about each scene's picture, in the order of the scenes."""
    first = {record["image"]: record for record in reversed(json.loads(file.read_text()))}
    return [first[scene["image"]] for scene in scenes]


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Return LLaVA's processor for the demo's pictures, which need no resizing."""
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_resize=False,
        do_center_crop=False,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=CELL,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def build_model(settings: BaseModelSettings, tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """Return a LLaVA with random weights: CLIP tower, two-layer projector, Llama."""
    vision = CLIPVisionConfig(
        hidden_size=settings.vision_width,
        intermediate_size=4 * settings.vision_width,
        num_hidden_layers=settings.vision_layers,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=CELL,
        initializer_factor=1.0,
    )
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=settings.text_width,
        intermediate_size=8 * settings.text_width // 3,
        num_hidden_layers=settings.text_layers,
        num_attention_heads=settings.text_heads,
        max_position_embeddings=2048,
        initializer_range=settings.initializer_range,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=GRID * GRID,
    )
    return LlavaForConditionalGeneration(config)
