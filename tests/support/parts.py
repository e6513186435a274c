"""Tiny parts that a base model is assembled from: a Vicuna, a CLIP, and LLaVA's projector file."""

from pathlib import Path

import sentencepiece
import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
)

IMAGE_SIZE, PATCH_SIZE = 28, 7
VISION_WIDTH, TEXT_WIDTH, VISION_LAYERS, TEXT_LAYERS = 32, 48, 3, 2
NUM_TOKENS = 340
CORPUS = """A chat between a curious user and an artificial intelligence assistant.
The assistant gives helpful, detailed, and polite answers to the user's questions. USER: ASSISTANT:
Answer the question using a single word or phrase. Is there a red digit in the image? yes no
What colour is it? Which one? Answer with the option's letter from the given choices directly. A B C D"""


def make_vicuna(folder: Path) -> Path:
    """Write a Llama as lmsys publishes Vicuna: weights as .bin, a SentencePiece model and no tokenizer.json."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=NUM_TOKENS,
        hidden_size=TEXT_WIDTH,
        intermediate_size=96,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=4,
        max_position_embeddings=4096,
        pad_token_id=0,
        dtype="float16",
    )
    model = LlamaForCausalLM(config).half()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.split("\n")),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=NUM_TOKENS,
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "legacy": false}')
    return folder


def make_clip(folder: Path) -> Path:
    """Write a CLIP with both towers and its image processor."""
    torch.manual_seed(1)
    width = {"hidden_size": VISION_WIDTH, "intermediate_size": 64, "num_attention_heads": 4}
    vision = {"num_hidden_layers": VISION_LAYERS, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
    text = width | {"num_hidden_layers": 1, "vocab_size": 50, "max_position_embeddings": 16}
    CLIPModel(CLIPConfig(text_config=text, vision_config=width | vision)).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=IMAGE_SIZE).save_pretrained(folder)
    return folder


def make_projector(file: Path, with_newline: bool = False) -> Path:
    """Write a projector file with the names that LLaVA's training uses."""
    torch.manual_seed(2)
    shapes = {"0.weight": (TEXT_WIDTH, VISION_WIDTH), "0.bias": (TEXT_WIDTH,)}
    shapes |= {"2.weight": (TEXT_WIDTH, TEXT_WIDTH), "2.bias": (TEXT_WIDTH,)}
    weights = {f"model.mm_projector.{name}": torch.randn(shape).half() for name, shape in shapes.items()}
    if with_newline:
        weights["model.image_newline"] = torch.randn(TEXT_WIDTH).half()
    torch.save(weights, file)
    return file


def hub_shapes(family, width, inner, layers, vocabulary, vision=(1024, 4096, 24, 577, 14)) -> dict[str, tuple]:
    """Return name -> shape of llava-hf/llava-1.5-*-hf and llava-hf/llava-v1.6-vicuna-*-hf, written out by hand.

    `vision` is (width, MLP width, layers, positions, patch size) of the tower.
    """
    shapes = {
        "language_model.model.embed_tokens.weight": (vocabulary, width),
        "language_model.model.norm.weight": (width,),
        "language_model.lm_head.weight": (vocabulary, width),
    }
    for index in range(layers):
        layer = f"language_model.model.layers.{index}"
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (width, inner)
        shapes |= {f"{layer}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    channels, vision_inner, vision_layers, positions, patch = vision
    tower = "vision_tower.vision_model"
    shapes |= {
        f"{tower}.embeddings.class_embedding": (channels,),
        f"{tower}.embeddings.patch_embedding.weight": (channels, 3, patch, patch),
        f"{tower}.embeddings.position_embedding.weight": (positions, channels),
    }
    for name in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"{tower}.{name}.{kind}": (channels,) for kind in ("weight", "bias")}
    for index in range(vision_layers):
        layer = f"{tower}.encoder.layers.{index}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"{layer}.self_attn.{name}.weight"] = (channels, channels)
            shapes[f"{layer}.self_attn.{name}.bias"] = (channels,)
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}.{name}.{kind}": (channels,) for kind in ("weight", "bias")}
        shapes |= {f"{layer}.mlp.fc1.weight": (vision_inner, channels), f"{layer}.mlp.fc1.bias": (vision_inner,)}
        shapes |= {f"{layer}.mlp.fc2.weight": (channels, vision_inner), f"{layer}.mlp.fc2.bias": (channels,)}
    shapes |= {
        "multi_modal_projector.linear_1.weight": (width, channels),
        "multi_modal_projector.linear_1.bias": (width,),
        "multi_modal_projector.linear_2.weight": (width, width),
        "multi_modal_projector.linear_2.bias": (width,),
    }
    return shapes | ({"image_newline": (width,)} if family == "llava_next" else {})
