"""Families that are tested like those of tests/support/families.py, with images of noise in their own forms."""

from functools import cache
from importlib.util import find_spec

import numpy as np
from PIL import Image
from transformers import (
    Gemma2Config,
    InternVLForConditionalGeneration,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    Qwen3Config,
)

from tests.support.families import (
    FAMILIES,
    IMAGE,
    SIGLIP_PROCESSOR,
    TEXT,
    Family,
    Images,
    built,
    encode_internvl,
    internvl,
    paligemma,
    square,
)
from tests.support.tiny_images import joined, noise, num_tokens, start_token, token_inputs_of
from tests.support.tiny_models import tiny_model

NAMES = {
    "qwen3_5": "Qwen3.5",
    "qwen3_5_moe": "Qwen3.5 MoE",
    "qwen3_vl_moe": "Qwen3-VL MoE",
    "gemma4": "Gemma 4",
    "glm4v": "GLM-4.1V",
    "glm4v_moe": "GLM-4.5V",
    "glm46v": "GLM-4.6V",
    "lfm2_vl": "LFM2-VL",
    "aya_vision": "Aya Vision",
    "cohere2_vision": "Command A Vision",
    "aria": "Aria",
    "got_ocr2": "GOT-OCR 2.0",
    "ovis2": "Ovis 2",
    "idefics2": "Idefics2",
    "molmo2": "Molmo 2",
}
"""Model type -> name in the tests' ids and in the table of families."""
if find_spec("timm"):  # in the environment of .ci/torchvision
    NAMES["perception_lm"] = "Perception LM"


@cache
def built_once(model_type: str) -> PreTrainedModel:
    """Model that counts the tokens of images."""
    return tiny_model(model_type).eval()


def encode(model_type: str, samples: Images):
    """Inputs of the tower, noise drawn from each picture's pixels, and the placeholders of each picture."""
    vlm = built_once(model_type)
    images = [[noise(vlm, seed_of(picture)) for picture in pictures] for pictures in samples]
    before = [token for token in [start_token(vlm)] if token is not None]
    placeholders = [[[*before, *[IMAGE] * sum(num_tokens(vlm, image))] for image in row] for row in images]
    return joined([image for row in images for image in row]), placeholders


def seed_of(picture: Image.Image) -> int:
    return int(np.asarray(picture, dtype=np.int64).sum()) % 1000


def family(model_type: str, name: str) -> Family:
    token_types = token_inputs_of(built_once(model_type))
    return Family(
        name,
        lambda: tiny_model(model_type).eval(),
        lambda samples: encode(model_type, samples),
        token_types[0] if token_types else None,
    )


def paligemma2() -> PreTrainedModel:
    """PaliGemma 2, which is PaliGemma's class with Gemma 2."""
    text = Gemma2Config(**TEXT, sliding_window=16, layer_types=["sliding_attention", "full_attention"])
    config = paligemma().config
    config.text_config = text
    return built(PaliGemmaForConditionalGeneration, config)


def internvl3_5() -> PreTrainedModel:
    """InternVL3.5, which is InternVL's class with Qwen3."""
    config = internvl().config
    config.text_config = Qwen3Config(**TEXT)
    return built(InternVLForConditionalGeneration, config)


FIRST_RANK = [family(model_type, name) for model_type, name in NAMES.items()]
FIRST_RANK += [
    Family("PaliGemma 2", paligemma2, square(SIGLIP_PROCESSOR), "token_type_ids"),
    Family("InternVL3.5", internvl3_5, encode_internvl),
]
ALL_FAMILIES = [*FAMILIES, *FIRST_RANK]
