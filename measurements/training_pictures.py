"""Pictures like LLaVA's photographs, as files and as rows of a prepared dataset, and processors for them."""

from pathlib import Path

import numpy as np
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    ProcessorMixin,
)

from dualspeed.chat_templates import load_template
from tests.support.word_tokenizer import word_tokenizer

SIDE, PATCH = 336, 14


def example(folder: Path, number: int) -> dict:
    """Row of a prepared dataset; writes its picture."""
    noise = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    path = folder / f"{number}.jpg"
    Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC).save(path, quality=90)
    question = [{"type": "image", "text": None}, {"type": "text", "text": "what is in the picture ? " * 8}]
    answer = [{"type": "text", "text": "there is a picture of many colours . " * 8}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": str(number), "messages": messages, "images": [str(path)]}


def processor_of(is_tiled: bool) -> ProcessorMixin:
    """Processor of LLaVA-1.5, or of LLaVA-NeXT where images are tiled, with a tokenizer of a few words."""
    words = "<unk> <s> </s> <pad> <image> what is in the picture ? there a of many colours .".split()
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    if is_tiled:
        kind, pictures = LlavaNextProcessor, LlavaNextImageProcessorPil(image_grid_pinpoints=[[672, 672]], **size)
    else:
        kind, pictures = LlavaProcessor, CLIPImageProcessorPil(**size)
    return kind(
        image_processor=pictures,
        tokenizer=word_tokenizer(words),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=load_template("vicuna_v1"),
    )
