"""Stock LLaVA and LLaVA-NeXT checkpoints with random weights, small enough for a CPU test, with their processors."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

from dualspeed.chat_templates import load_template
from tests.support.word_tokenizer import word_tokenizer

IMAGE_SIZE = 28
PATCH_SIZE = 7
NUM_IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
GRID_PINPOINTS = [[28, 56], [56, 28], [56, 56]]
WORDS = (
    "user : assistant is there a red blue green 1 2 3 what colour the how many ? yes no USER ASSISTANT . digit".split()
)
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]


def tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer with the special tokens of LLaVA."""
    splits = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    return word_tokenizer([*SPECIAL_TOKENS, *dict.fromkeys(WORDS)], splits)


def configs(dropout: float = 0.0) -> dict:
    """Vision and text configurations that the models share."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=32,
    )
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        attention_dropout=dropout,
        pad_token_id=SPECIAL_TOKENS.index("<pad>"),
        bos_token_id=SPECIAL_TOKENS.index("<s>"),
        eos_token_id=SPECIAL_TOKENS.index("</s>"),
    )
    return {
        "vision_config": vision,
        "text_config": text,
        "image_token_id": SPECIAL_TOKENS.index("<image>"),
        "vision_feature_layer": -2,
    }


def llava(seed: int = 0, **kwargs) -> LlavaForConditionalGeneration:
    """A random LLaVA-1.5 whose vision tower is frozen."""
    torch.manual_seed(seed)
    return frozen_tower(spread(LlavaForConditionalGeneration(LlavaConfig(**configs(**kwargs)))))


def llava_next(seed: int = 0, **kwargs) -> LlavaNextForConditionalGeneration:
    """A random LLaVA-NeXT whose vision tower is frozen."""
    torch.manual_seed(seed)
    config = LlavaNextConfig(**configs(**kwargs), image_grid_pinpoints=GRID_PINPOINTS)
    return frozen_tower(spread(LlavaNextForConditionalGeneration(config)))


def llava_siglip(seed: int = 0, **kwargs) -> LlavaForConditionalGeneration:
    """A random LLaVA whose vision tower has no CLS token."""
    torch.manual_seed(seed)
    clip = configs(**kwargs)
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    vision = SiglipVisionConfig(**{name: getattr(clip["vision_config"], name) for name in sizes})
    config = LlavaConfig(**clip | {"vision_config": vision}, vision_feature_select_strategy="full")
    return frozen_tower(spread(LlavaForConditionalGeneration(config)))


def spread(model):
    """Larger weights than an untrained model's, so that answers depend on the input."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


def frozen_tower(model):
    """Freeze the vision tower, as both stages of training do."""
    model.model.vision_tower.requires_grad_(False)
    return model


def llava_processor() -> LlavaProcessor:
    """Processor of `llava()`."""
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        ),
        tokenizer=tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=load_template("turns"),
    )


def llava_next_processor() -> LlavaNextProcessor:
    """Processor of `llava_next()`."""
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": IMAGE_SIZE},
            crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            image_grid_pinpoints=GRID_PINPOINTS,
        ),
        tokenizer=tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=load_template("turns"),
    )


def save_with_hub_names(model, folder: Path) -> None:
    """Save under the Hub's parameter names; transformers keeps the names that it loaded a model under."""
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    renamed = {name.replace("vision_tower.", "vision_tower.vision_model."): value for name, value in weights.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


def make_llava(folder: Path) -> Path:
    """A LLaVA-1.5 checkpoint folder with its processor."""
    save_with_hub_names(llava(), folder)
    llava_processor().save_pretrained(folder)
    return folder


def make_llava_next(folder: Path) -> Path:
    """A LLaVA-NeXT checkpoint folder with its processor."""
    save_with_hub_names(llava_next(), folder)
    llava_next_processor().save_pretrained(folder)
    return folder
