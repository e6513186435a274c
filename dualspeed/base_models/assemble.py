"""Base models: a Llama and a CLIP tower become a stock LLaVA checkpoint, as LLaVA's own training starts from them.

Enters: folders of both, and the projector that LLaVA publishes, if it shall not start from random weights. Leaves: a
checkpoint in the Hub's names with its processor. Vicuna's 32,000 tokens become <image> 32,000 and <pad> 32,001 more,
and the vocabulary is filled up to 32,064, as in the checkpoints on the Hub.
"""

import logging
import re
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from dualspeed.base_models.hub_names import save_with_hub_names
from dualspeed.chat_templates import load_template
from dualspeed.errors import BaseModelError
from dualspeed.settings.model import LLAVA_NEXT_GRIDS, ModelParts

logger = logging.getLogger(__name__)

IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
VOCABULARY_MULTIPLE = 64
"""Vocabularies are filled up to a multiple of this, which matrix products like."""
FEATURE_LAYER = -2
"""Vision layer whose output the projector sees."""
CLASSES = {
    "llava": (LlavaConfig, LlavaForConditionalGeneration),
    "llava_next": (LlavaNextConfig, LlavaNextForConditionalGeneration),
}
PROJECTOR_NAMES = {"mm_projector.0": "linear_1", "mm_projector.2": "linear_2"}
"""Modules of LLaVA's projector file -> those of transformers."""


def assemble(parts: ModelParts, out: Path) -> None:
    """Put a base model together and write it to folder `out`, whole or not at all.

    Raises:
        BaseModelError: a part is missing, or doesn't fit the others.
    """
    for part in parts.inputs:
        if not Path(part).exists():
            raise BaseModelError(f"{part}: does not exist; valid: a part of the model, downloaded")
    tokenizer = make_tokenizer(parts.language_model)
    config = make_config(
        parts,
        text=AutoConfig.from_pretrained(parts.language_model),
        vision=CLIPVisionConfig.from_pretrained(parts.vision_tower),
        tokenizer=tokenizer,
    )
    model = build_model(config, getattr(torch, parts.dtype))
    logger.info("language model: %s", parts.language_model)
    weights = language_weights(parts, config.text_config.vocab_size)
    logger.info("vision tower: %s", parts.vision_tower)
    tower = CLIPVisionModel.from_pretrained(parts.vision_tower, dtype=model.dtype)
    weights |= {f"model.vision_tower.{name}": value for name, value in tower.state_dict().items()}
    weights |= projector_weights(parts.projector, config)
    model.load_state_dict({name: value.to(model.dtype) for name, value in weights.items()}, assign=True)
    save_with_hub_names(model, make_processor(parts, config, tokenizer), out)
    logger.info("%s: %s of %.2f billion parameters", out, type(model).__name__, model.num_parameters() / 1e9)


def make_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """The language model's tokenizer with tokens for images and padding behind its own."""
    tokenizer = AutoTokenizer.from_pretrained(folder, extra_special_tokens={"image_token": IMAGE_TOKEN})
    tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    return tokenizer


def make_config(
    parts: ModelParts, text: PreTrainedConfig, vision: CLIPVisionConfig, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedConfig:
    """The model's configuration; `text` gets the tokenizer's vocabulary, filled up."""
    text.vocab_size = padded(len(tokenizer))
    text.bos_token_id, text.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    text.pad_token_id = tokenizer.convert_tokens_to_ids(PAD_TOKEN)
    arguments = {
        "text_config": text,
        "vision_config": vision,
        "image_token_id": tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        "vision_feature_layer": FEATURE_LAYER,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "image_seq_length": (vision.image_size // vision.patch_size) ** 2,
        "tie_word_embeddings": False,
    }
    if parts.family == "llava_next":
        arguments["image_grid_pinpoints"] = [list(grid) for grid in parts.image_grid_pinpoints or LLAVA_NEXT_GRIDS]
    return CLASSES[parts.family][0](**arguments)


def padded(vocabulary: int) -> int:
    """The next multiple of VOCABULARY_MULTIPLE."""
    return -(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def build_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model without any weights: on the meta device."""
    model_class = next(model for kind, model in CLASSES.values() if kind is type(config))
    with torch.device("meta"):
        model = model_class(config).to(dtype)
    text = config.text_config
    model.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
    )
    return model


def language_weights(parts: ModelParts, vocabulary: int) -> dict[str, Tensor]:
    """Weights of the language model; new tokens get the mean of the old ones, in embeddings and head."""
    language = AutoModelForCausalLM.from_pretrained(parts.language_model, dtype=getattr(torch, parts.dtype))
    weights = language.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old = weights[name]
        if len(old) > vocabulary:
            raise BaseModelError(f"{parts.language_model}: {name} has {len(old)} rows; valid: at most {vocabulary}")
        mean = old.float().mean(dim=0).to(old.dtype)
        weights[name] = torch.cat([old, mean.expand(vocabulary - len(old), -1)])
    return {re.sub(r"^model\.", "model.language_model.", name): value for name, value in weights.items()}


def projector_weights(file: str | None, config: PreTrainedConfig) -> dict[str, Tensor]:
    """Weights of what joins vision and language: from LLaVA's file, or random ones, always the same."""
    torch.manual_seed(0)
    fresh = LlavaMultiModalProjector(config).state_dict()
    prefix = "model.multi_modal_projector."
    weights = {f"{prefix}{name}": value for name, value in fresh.items()}
    if isinstance(config, LlavaNextConfig):
        width = config.text_config.hidden_size
        weights["model.image_newline"] = torch.randn(width) / width**0.5
    if file is None:
        return weights
    published = {}
    for name, value in torch.load(file, map_location="cpu", weights_only=True).items():
        if match := re.search(r"(mm_projector\.[02])\.(weight|bias)$", name):
            published[f"{prefix}{PROJECTOR_NAMES[match[1]]}.{match[2]}"] = value
        elif name.endswith("image_newline"):
            published["model.image_newline"] = value
    found = {name: tuple(value.shape) for name, value in published.items()}
    valid = {name: tuple(value.shape) for name, value in weights.items()}
    # Projectors of LLaVA-1.5 serve LLaVA-NeXT too; its newline then starts from random weights.
    if (
        found.keys() | {"model.image_newline"} != valid.keys() | {"model.image_newline"}
        or found.items() - valid.items()
    ):
        raise BaseModelError(f"{file}: is no projector of this model; found: {found}; valid: {valid}")
    return weights | published


def make_processor(parts: ModelParts, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
    """The model's processor, with the prompt format of its instruction tuning."""
    settings = CLIPImageProcessorPil.from_pretrained(parts.vision_tower).to_dict()
    if parts.family == "llava_next":
        settings["image_grid_pinpoints"] = config.image_grid_pinpoints
        processor_class, image_processor = LlavaNextProcessor, LlavaNextImageProcessorPil.from_dict(settings)
    else:
        processor_class, image_processor = LlavaProcessor, LlavaImageProcessorPil.from_dict(settings)
    return processor_class(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=load_template("vicuna_v1"),
    )
