"""Base models: a Llama and a CLIP tower become a stock LLaVA checkpoint, from which LLaVA's own training starts.

Input: the folders of both, and optionally the projector file that LLaVA publishes; without it the projector gets random
weights. Output: a checkpoint with the Hub's parameter names, and its processor. Vicuna's 32,000 tokens get two more,
<image> (32,000) and <pad> (32,001), and the vocabulary is padded to 32,064, as in the Hub's checkpoints.
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
from dualspeed.settings.families import BASE_FAMILIES, padded_vocabulary
from dualspeed.settings.model import ModelParts

logger = logging.getLogger(__name__)

IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
FEATURE_LAYER = -2
"""Vision layer whose output is the projector's input."""
CLASSES = {
    "llava": (LlavaConfig, LlavaForConditionalGeneration),
    "llava_next": (LlavaNextConfig, LlavaNextForConditionalGeneration),
}
PROJECTOR_NAMES = {"mm_projector.0": "linear_1", "mm_projector.2": "linear_2"}
"""Module names in LLaVA's projector file -> names in transformers."""


def assemble(parts: ModelParts, out: Path) -> None:
    """Assemble a base model and write it to folder `out`, complete or not at all.

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
    """Return the language model's tokenizer with two tokens added, for images and padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder, extra_special_tokens={"image_token": IMAGE_TOKEN})
    tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    return tokenizer


def make_config(
    parts: ModelParts, text: PreTrainedConfig, vision: CLIPVisionConfig, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedConfig:
    """Return the model's configuration; sets in `text` the padded size of the tokenizer's vocabulary."""
    text.vocab_size = padded_vocabulary(len(tokenizer))
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
    if grids := parts.image_grid_pinpoints or BASE_FAMILIES[parts.family].grids:
        arguments["image_grid_pinpoints"] = [list(grid) for grid in grids]
    return CLASSES[parts.family][0](**arguments)


def build_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model without weights, on the meta device."""
    model_class = next(model for kind, model in CLASSES.values() if kind is type(config))
    with torch.device("meta"):
        model = model_class(config).to(dtype)
    text = config.text_config
    model.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
    )
    return model


def language_weights(parts: ModelParts, vocabulary: int) -> dict[str, Tensor]:
    """Return the language model's weights with `vocabulary` rows in embeddings and head; new rows are their mean."""
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
    """Return the weights of projector and newline: those of LLaVA's file, else random ones from a fixed seed."""
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
    # LLaVA-1.5's projectors fit LLaVA-NeXT too; its newline then starts from random weights.
    if (
        found.keys() | {"model.image_newline"} != valid.keys() | {"model.image_newline"}
        or found.items() - valid.items()
    ):
        raise BaseModelError(f"{file}: is no projector of this model; found: {found}; valid: {valid}")
    return weights | published


def make_processor(parts: ModelParts, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
    """Return the model's processor, with the chat template of its instruction tuning."""
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
