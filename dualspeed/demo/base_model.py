"""Base model of the demo: a tiny LLaVA in stock classes, trained within minutes.

It is trained twice (dualspeed.demo.base_training): first the vision tower on labelled patches, which then stays frozen
like CLIP; then the language model and projector on captions and questions about excerpts of images, in place of a large
model's instruction tuning. Whole images are seen only by the trainings of the sheet's rows. Input: the demo's data
folder. Output: a checkpoint with its processor, with the Hub's parameter names.
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
from dualspeed.settings.demo import BaseModelSettings
from dualspeed.settings.families import padded_vocabulary

IMAGE_SIZE = GRID * CELL
"""Pixels along an image's side."""


def make_base_model(settings: BaseModelSettings, data: Path, out: Path) -> None:
    """Train the base model on `data` (see dualspeed.demo.scenes) and write it to folder `out`, complete or not at all.

    Raises:
        DivergenceError: a training's loss is no longer finite.
    """
    torch.manual_seed(settings.seed)
    processor = make_processor(make_tokenizer())
    model = build_model(settings, processor.tokenizer)

    scenes = json.loads((data / "scenes.json").read_text())[: settings.num_scenes]
    pixels = load_pixels([data / "images" / "train" / scene["image"] for scene in scenes], processor)
    train_vision_tower(model.model.vision_tower, settings, pixels, scenes)
    features = encode_images(model.model.vision_tower, pixels)
    captions = caption_texts(processor.tokenizer, first_records(data / "pretrain.json", scenes))
    conversations = conversation_texts(processor, first_records(data / "finetune.json", scenes))
    train_language_model(model, settings, features, captions, conversations, patch_labels(scenes)[1] > 0)
    save_with_hub_names(model, processor, out)


def first_records(file: Path, scenes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the first record about each scene's image, in the order of the scenes."""
    first = {record["image"]: record for record in reversed(json.loads(file.read_text()))}
    return [first[scene["image"]] for scene in scenes]


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Return LLaVA's processor for the demo's images, which need no resizing."""
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
        vocab_size=padded_vocabulary(len(tokenizer)),
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
