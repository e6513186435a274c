"""The demo's base model: a tiny LLaVA in stock classes, made in minutes as large ones are made in weeks.

Three trainings, none of which shows it a picture with a question: the vision tower on labelled patches (then frozen,
like CLIP), the language model on text alone (scenes in words, questions, answers), and language model with projector
on captions. Enters: the demo's data folder. Leaves: a checkpoint with its processor, in the Hub's parameter names.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dualspeed.demo.drawing import CELL, COLOURS, GRID, sample_scene
from dualspeed.demo.questions import ask_turns, caption
from dualspeed.demo.settings import BaseModelSettings, settings_from_dict
from dualspeed.demo.tokenizer import make_tokenizer
from dualspeed.files import atomic_folder

NUM_PATCHES = GRID * GRID
IMAGE_SIZE = GRID * CELL


def make_base_model(settings: dict[str, Any], data: Path, out: Path) -> None:
    """Train the base model on `data` (see dualspeed.demo.scenes) and write it to folder `out`, whole or not at all.

    Raises:
        ValueError: unknown setting.
    """
    chosen = settings_from_dict(BaseModelSettings, settings)
    torch.manual_seed(chosen.seed)
    processor = make_processor()
    model = build_model(chosen, processor.tokenizer)
    scenes = json.loads((data / "scenes.json").read_text())[: chosen.caption_scenes]
    pixels = load_pixels([data / "images" / "train" / scene["image"] for scene in scenes], processor)
    train_vision_tower(model, chosen, pixels, scenes)
    features = encode_images(model, pixels)
    train_on_text(model, chosen, processor.tokenizer)
    captions = [text for text in json.loads((data / "pretrain.json").read_text())[: len(scenes)]]
    train_on_captions(model, chosen, processor.tokenizer, features, captions)
    save_with_hub_names(model, processor, out)
