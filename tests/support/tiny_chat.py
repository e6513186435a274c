"""Tiny checkpoints that chat as a family's own do: real model and processor, the stock chat template, a byte tokenizer.

Each byte of a text is a token, so that tokens decode to exactly the text that they were made of. Without torchvision
there are no video processors: four families then have a processor of the same class that takes images alone.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoProcessor,
    Gemma3Processor,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4Processor,
    Idefics3Processor,
    Lfm2VlConfig,
    Lfm2VlForConditionalGeneration,
    Lfm2VlProcessor,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLProcessor,
    SmolVLMProcessor,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.utils import is_torchvision_available

from tests.support import families, tiny

STOCK_TEMPLATES = Path(trl.__file__).parent / "chat_templates"
SIDE = families.SIDE


@dataclass(frozen=True)
class Chat:
    """A family's checkpoint in small."""

    stock: str
    """File of the stock template in STOCK_TEMPLATES."""
    end_of_turn: str
    """Token that ends an answer."""
    model: Callable[[], PreTrainedModel]
    """Random model."""
    processor: Callable[[PreTrainedTokenizerFast, str], ProcessorMixin]
    """Processor of a tokenizer and a chat template."""
    image: str = "<image>"
    """Placeholder, token 4 as in tests/support/families.py."""
    bos: str = "<s>"
    eos: str = "</s>"
    others: tuple[str, ...] = ()
    """Further special tokens; the first four are tokens 5 to 8."""
    named: tuple[tuple[str, str], ...] = ()
    """Attribute of the tokenizer -> token, for what the processor asks of it."""
    needs_torchvision: bool = False
    """True if no processor can be made without it, of images alone either."""


def stock_template(name: str) -> str:
    """Stock chat template of a name in CHATS, as trl keeps it."""
    return (STOCK_TEMPLATES / f"{CHATS[name].stock}.jinja").read_text(encoding="utf-8")


def byte_tokenizer(chat: Chat) -> PreTrainedTokenizerFast:
    """Tokenizer of a family's special tokens and 256 bytes."""
    special = ["<unk>", chat.bos, chat.eos, "<pad>", chat.image, *chat.others]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(special))}
    vocabulary |= {
        byte: len(vocabulary) + index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token=chat.bos,
        eos_token=chat.eos,
        pad_token="<pad>",
        extra_special_tokens={"image_token": chat.image, **dict(chat.named)},
    )


def tiny_chat(name: str, folder: Path) -> Path:
    """Save model and processor of a name in CHATS to `folder`, which the Auto classes load."""
    model, processor = tiny_parts(name)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def tiny_parts(name: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Model and processor of a name in CHATS, in memory."""
    chat = CHATS[name]
    processor = tiny_processor(name)
    model = chat.model()
    torch.manual_seed(0)
    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    return model, processor


def tiny_processor(name: str) -> ProcessorMixin:
    """Processor of a name in CHATS."""
    chat = CHATS[name]
    return chat.processor(byte_tokenizer(chat), stock_template(name))


class ImagesAlone(ProcessorMixin):
    """Second base of a processor class that leaves out its parts for video and sound."""

    def __init__(self, *args, video_processor=None, feature_extractor=None, **kwargs):
        super().__init__(*args[:2], **kwargs)


def of_images(base: type[ProcessorMixin], **settings: Any) -> type[ProcessorMixin]:
    """Processor class of images alone, with these settings; AutoProcessor knows it by its name."""
    left_out = inspect.signature(base.__init__).parameters.keys() & {"video_processor", "feature_extractor"}

    def initialize(self, image_processor=None, tokenizer=None, chat_template=None):
        parts = {"image_processor": image_processor, "tokenizer": tokenizer, "chat_template": chat_template}
        base.__init__(self, **parts, **dict.fromkeys(left_out), **settings)

    made = type(f"{base.__name__}OfImages", (base, ImagesAlone), {"__init__": initialize})
    AutoProcessor.register(made, made, exist_ok=True)
    return made


def with_video(base: type[ProcessorMixin], others: dict[str, str], images: Any, **settings: Any) -> Callable:
    """Function (tokenizer, template) -> processor of a class that also takes video or sound.

    Args:
        others: keyword -> class of a part for video or sound.
        images: image processor.
    """
    alone = None if is_torchvision_available() else of_images(base, **settings)

    def make(tokenizer: PreTrainedTokenizerFast, template: str) -> ProcessorMixin:
        parts = {"image_processor": images, "tokenizer": tokenizer, "chat_template": template}
        if alone is not None:
            return alone(**parts)
        return base(**parts, **{keyword: getattr(transformers, name)() for keyword, name in others.items()}, **settings)

    return make


if not is_torchvision_available():
    processing_smolvlm.num2words = str  # it writes a video's number of frames in words
    SmolVLMProcessor.video_processor = SimpleNamespace(num_frames=1, fps=1)


def qwen_images(patch_size: int) -> Qwen2VLImageProcessorPil:
    """Image processor of the Qwen-VL families, with 4 to 24 tokens an image."""
    side = patch_size * 2
    size = {"shortest_edge": 4 * side**2, "longest_edge": 24 * side**2}
    return Qwen2VLImageProcessorPil(patch_size=patch_size, merge_size=2, size=size)


def qwen3_5() -> PreTrainedModel:
    """Random Qwen3.5 with a layer of linear attention."""
    text = {name: value for name, value in families.TEXT.items() if name != "num_hidden_layers"}
    text |= {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2}
    text |= {
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 8}
    vision |= {"out_hidden_size": 32, "num_position_embeddings": 64}
    config = Qwen3_5Config(vision_config=vision, text_config=text, **families.QWEN_TOKENS)
    return families.built(Qwen3_5ForConditionalGeneration, config)


def gemma4() -> PreTrainedModel:
    """Random Gemma 4 without sound."""
    text = families.TEXT | {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    text |= {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 0, "per_layer_config": {}}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"num_key_value_heads": 4, "head_dim": 8, "patch_size": 4, "pooling_kernel_size": 3}
    ids = {"image_token_id": 4, "boi_token_id": 5, "video_token_id": 6, "eoi_token_id": 7, "boa_token_id": 8}
    ids |= {"eoa_token_index": 9, "audio_token_id": 10}
    config = Gemma4Config(text_config=text, vision_config=vision, **ids)
    return families.built(Gemma4ForConditionalGeneration, config)


def lfm2_vl() -> PreTrainedModel:
    """Random LFM2-VL with a layer of convolution."""
    text = families.TEXT | {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"patch_size": 7, "num_patches": 16}
    config = Lfm2VlConfig(vision_config=vision, text_config=text, image_token_id=4, projector_hidden_size=32)
    return families.built(Lfm2VlForConditionalGeneration, config)


def llava_next_processor(tokenizer: PreTrainedTokenizerFast, template: str) -> ProcessorMixin:
    """Processor of `tiny.llava_next`."""
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    images = LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=tiny.GRID_PINPOINTS)
    select = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return LlavaNextProcessor(images, tokenizer, patch_size=tiny.PATCH_SIZE, chat_template=template, **select)


def lfm2_vl_processor(tokenizer: PreTrainedTokenizerFast, template: str) -> ProcessorMixin:
    """Processor of `lfm2_vl`; it needs torchvision."""
    images = transformers.Lfm2VlImageProcessor(
        encoder_patch_size=7, tile_size=28, min_image_tokens=2, max_image_tokens=8
    )
    return Lfm2VlProcessor(images, tokenizer, chat_template=template)


SPLIT = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}, "do_image_splitting": True}
FAKE = "<fake_token_around_image>"
TILES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4))
QWEN = {
    "end_of_turn": "<|im_end|>",
    "bos": "<|endoftext|>",
    "eos": "<|im_end|>",
    "image": "<|image_pad|>",
    "others": ("<|im_start|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
}
QWEN_VIDEO = {"video_processor": "Qwen2VLVideoProcessor"}
QWEN3 = QWEN | {"processor": with_video(Qwen3VLProcessor, {"video_processor": "Qwen3VLVideoProcessor"}, qwen_images(8))}
QWEN3_5 = QWEN3 | {"model": qwen3_5, "others": (*QWEN["others"], "<think>", "</think>")}
GEMMA4_OTHERS = ("<|image>", "<|video|>", "<image|>", "<|audio>", "<audio|>", "<|audio|>", "<|turn>", "<turn|>")
GEMMA4_NAMES = (("boi_token", "<|image>"), ("eoi_token", "<image|>"), ("boa_token", "<|audio>"))
GEMMA4_NAMES = (*GEMMA4_NAMES, ("eoa_token", "<audio|>"), ("audio_token", "<|audio|>"))
GEMMA4_PARTS = {"video_processor": "Gemma4VideoProcessor", "feature_extractor": "Gemma4AudioFeatureExtractor"}
GEMMA4 = {
    "end_of_turn": "<turn|>",
    "model": gemma4,
    "processor": with_video(Gemma4Processor, GEMMA4_PARTS, Gemma4ImageProcessorPil(patch_size=4, max_soft_tokens=70)),
    "image": "<|image|>",
    "bos": "<bos>",
    "eos": "<eos>",
    "others": GEMMA4_OTHERS,
    "named": GEMMA4_NAMES,
}

CHATS = {
    "qwen2_vl": Chat(
        **QWEN,
        stock="qwen2_5_vl",
        model=families.qwen2_vl,
        processor=with_video(Qwen2VLProcessor, QWEN_VIDEO, qwen_images(7)),
    ),
    "qwen2_5_vl": Chat(
        **QWEN,
        stock="qwen2_5_vl",
        model=families.qwen2_5_vl,
        processor=with_video(Qwen2_5_VLProcessor, QWEN_VIDEO, qwen_images(7)),
    ),
    "qwen3_vl": Chat(**QWEN3, stock="qwen3_vl", model=families.qwen3_vl),
    "qwen3_5_nothink": Chat(**QWEN3_5, stock="qwen3_5_nothink"),
    "qwen3_5_think": Chat(**QWEN3_5, stock="qwen3_5_think"),
    "qwen3_6": Chat(**QWEN3_5, stock="qwen3_6"),
    "gemma3": Chat(
        stock="gemma3",
        end_of_turn="<end_of_turn>",
        model=families.gemma3,
        processor=lambda tokenizer, template: Gemma3Processor(
            Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE}), tokenizer, template, image_seq_length=4
        ),
        image="<image_soft_token>",
        bos="<bos>",
        eos="<eos>",
        others=("<start_of_image>", "<end_of_image>", "<start_of_turn>", "<end_of_turn>"),
        named=(("boi_token", "<start_of_image>"), ("eoi_token", "<end_of_image>")),
    ),
    **{name: Chat(**GEMMA4, stock=name) for name in ("gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5")},
    "idefics3": Chat(
        stock="idefics3",
        end_of_turn="<end_of_utterance>",
        model=families.idefics3,
        processor=lambda tokenizer, template: Idefics3Processor(
            Idefics3ImageProcessorPil(**SPLIT), tokenizer, image_seq_len=4, chat_template=template
        ),
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        others=(FAKE, "<end_of_utterance>", "<global-img>", *TILES),
    ),
    "smolvlm": Chat(
        stock="smolvlm",
        end_of_turn="<end_of_utterance>",
        model=families.smolvlm,
        processor=with_video(
            SmolVLMProcessor,
            {"video_processor": "SmolVLMVideoProcessor"},
            SmolVLMImageProcessorPil(**SPLIT),
            image_seq_len=4,
        ),
        bos="<|im_start|>",
        eos="<end_of_utterance>",
        others=(FAKE, "<end_of_utterance>", "<global-img>", *TILES),
    ),
    "llava_next": Chat(stock="llava_next", end_of_turn="</s>", model=tiny.llava_next, processor=llava_next_processor),
    "lfm2_5_vl": Chat(
        stock="lfm2_2_5_vl",
        end_of_turn="<|im_end|>",
        model=lfm2_vl,
        processor=lfm2_vl_processor,
        bos="<|startoftext|>",
        eos="<|im_end|>",
        others=("<|im_start|>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"),
        needs_torchvision=True,
    ),
}
"""Name of a stock template -> its family; Qwen2-VL's is Qwen2.5-VL's."""
