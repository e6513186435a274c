"""Processors that need torchvision, built for real on tiny vocabularies, with the tiny models that they serve."""

import transformers
from transformers import PreTrainedTokenizerFast, ProcessorMixin

from tests.support import families, tiny
from tests.support.tiny_chat import CHATS, Chat, byte_tokenizer, tiny_parts

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE{% elif message.role == 'assistant' %}"
    "{% generation %}{{ part.text }}</s>{% endgeneration %}{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
SIZE = {"height": families.SIDE, "width": families.SIDE}


def onevision(tokenizer: PreTrainedTokenizerFast, template: str) -> ProcessorMixin:
    images = transformers.LlavaOnevisionImageProcessor(size=SIZE, image_grid_pinpoints=tiny.GRID_PINPOINTS)
    return transformers.LlavaOnevisionProcessor(
        images,
        tokenizer,
        transformers.LlavaOnevisionVideoProcessor(size=SIZE),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=template,
    )


def internvl(tokenizer: PreTrainedTokenizerFast, template: str) -> ProcessorMixin:
    images = transformers.GotOcr2ImageProcessor(size=SIZE, crop_to_patches=True, min_patches=1, max_patches=3)
    video = transformers.InternVLVideoProcessor(size=SIZE)
    return transformers.InternVLProcessor(images, tokenizer, video, image_seq_length=4, chat_template=template)


def pixtral(tokenizer: PreTrainedTokenizerFast, template: str) -> ProcessorMixin:
    images = transformers.PixtralImageProcessor(size={"longest_edge": 56}, patch_size={"height": 14, "width": 14})
    return transformers.PixtralProcessor(
        images,
        tokenizer,
        patch_size=14,
        image_token="<image>",
        image_break_token="<break>",
        image_end_token="<end>",
        chat_template=template,
    )


OTHERS = {
    "llava_onevision": Chat("", "</s>", families.onevision, onevision, others=("<video>",)),
    "internvl": Chat(
        "",
        "</s>",
        families.internvl,
        internvl,
        image="<IMG_CONTEXT>",
        others=("<img>", "</img>", "<video>"),
        named=(
            ("start_image_token", "<img>"),
            ("end_image_token", "</img>"),
            ("context_image_token", "<IMG_CONTEXT>"),
            ("video_token", "<video>"),
        ),
    ),
    "pixtral": Chat("", "</s>", families.mistral3, pixtral, others=("<break>", "<end>")),
}
"""Families without a training template of their own, whose processors need torchvision."""
NAMES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5_nothink", "smolvlm", "gemma4", "lfm2_5_vl", *OTHERS)


def parts(name: str):
    """Model and processor of a name in NAMES."""
    if name in CHATS:
        return tiny_parts(name)
    chat = OTHERS[name]
    processor = chat.processor(byte_tokenizer(chat), TEMPLATE.replace("IMAGE", chat.image))
    model = chat.model()
    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    return model, processor
