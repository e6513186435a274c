"""Tiny random models of every supported family, made of its real classes, and batches for them.

Pixels come from each family's PIL image processor. Placeholders are written here in the way of its processor, since
some processors can't be built without torchvision.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaNextImageProcessorPil,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PixtralImageProcessorPil,
    PixtralVisionConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from tests.support import tiny

IMAGE, ROW, PAD = 4, 5, 3
SIDE, PATCH = 28, 7
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}
SIZES = [(30, 62), (60, 21), (28, 28)]
Images = list[list[Image.Image]]


@dataclass(frozen=True)
class Family:
    """Family under test: its name, a random model, and the encoding of images."""

    name: str
    build: Callable[[], PreTrainedModel]
    encode: Callable[[Images], tuple[dict[str, torch.Tensor], list[list[list[int]]]]]
    """Function from each sample's images to the inputs of the vision tower and the tokens of each image."""
    token_types: str | None = None
    """Name of the input that marks image tokens, if the family needs one."""


def square(processor, num_tokens: int = 16) -> Callable:
    """Encoding of images of one size, 4 x 4 patches, as `num_tokens` tokens."""

    def encode(samples: Images):
        flat = [image for images in samples for image in images]
        pixels = processor(images=flat, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels}, [[[IMAGE] * num_tokens for _ in images] for images in samples]

    return encode


def counted(inputs: dict[str, torch.Tensor], samples: Images, counts: list[int]):
    """Inputs as they are, and one run of placeholders per image."""
    remaining = iter(counts)
    return inputs, [[[IMAGE] * next(remaining) for _ in images] for images in samples]


CLIP_PROCESSOR = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
SIGLIP_PROCESSOR = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})


def encode_llava_next(samples: Images):
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    processor = LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=tiny.GRID_PINPOINTS)
    encoded = processor(images=[image for images in samples for image in images], return_tensors="pt")
    return counted(dict(encoded), samples, num_tokens(tiny.llava_next(), dict(encoded)))


def encode_onevision(samples: Images):
    processor = LlavaOnevisionImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=tiny.GRID_PINPOINTS
    )
    encoded = dict(processor(images=samples, return_tensors="pt"))
    encoded["batch_num_images"] = torch.tensor([len(images) for images in samples if images])
    return counted(encoded, samples, num_tokens(onevision(), encoded))


def num_tokens(vlm: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> list[int]:
    """Number of visual tokens of each image in the stock model."""
    with torch.no_grad():
        return [len(image) for image in vlm.get_image_features(**inputs, return_dict=True).pooler_output]


def encode_internvl(samples: Images):
    """Encode images as tiles; all tiles of an image are one run of placeholders."""
    processor = GotOcr2ImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, crop_to_patches=True, min_patches=1, max_patches=3
    )
    encoded = processor(images=[image for images in samples for image in images], return_tensors="pt")
    counts = [4 * int(count) for count in encoded["num_patches"]]
    return counted({"pixel_values": encoded["pixel_values"]}, samples, counts)


def encode_qwen(patch_size: int) -> Callable:
    def encode(samples: Images):
        side = patch_size * 2
        processor = Qwen2VLImageProcessorPil(
            patch_size=patch_size, merge_size=2, size={"shortest_edge": 4 * side**2, "longest_edge": 24 * side**2}
        )
        encoded = processor(images=[image for images in samples for image in images], return_tensors="pt")
        return counted(dict(encoded), samples, [int(grid.prod()) // 4 for grid in encoded["image_grid_thw"]])

    return encode


def encode_idefics3(samples: Images):
    """Encode images as tiles between row and column tokens."""
    processor = Idefics3ImageProcessorPil(
        size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=True
    )
    encoded = processor(images=samples, return_tensors="pt", return_row_col_info=True)
    placeholders = []
    for rows, columns in zip(encoded["rows"], encoded["cols"], strict=True):
        tiles = [max(1, height * width + 1) if height else 1 for height, width in zip(rows, columns, strict=True)]
        placeholders.append([([ROW] + [IMAGE] * 4) * count + [ROW] for count in tiles])
    return {name: encoded[name] for name in ("pixel_values", "pixel_attention_mask")}, placeholders


def encode_mistral3(samples: Images):
    """Encode images as rows of tokens with a break after each."""
    processor = PixtralImageProcessorPil(size={"longest_edge": 56}, patch_size={"height": 14, "width": 14})
    encoded = processor(images=[image for images in samples for image in images], return_tensors="pt")
    sizes = iter(encoded["image_sizes"].tolist())
    placeholders = []
    for images in samples:
        grids = [[side // 14 for side in next(sizes)] for _ in images]
        placeholders.append([([IMAGE] * columns + [ROW]) * rows for rows, columns in grids])
    return dict(encoded), placeholders


def built(model_class: type, config) -> PreTrainedModel:
    """Random model with weights large enough that its outputs depend on its input."""
    torch.manual_seed(0)
    return tiny.spread(model_class(config))


def onevision() -> PreTrainedModel:
    vision = SiglipVisionConfig(**VISION)
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        image_grid_pinpoints=tiny.GRID_PINPOINTS,
    )
    return built(LlavaOnevisionForConditionalGeneration, config)


def vipllava() -> PreTrainedModel:
    config = VipLlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        vision_feature_layer=[-2, -3, 1],
    )
    return built(VipLlavaForConditionalGeneration, config)


def internvl() -> PreTrainedModel:
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**VISION | {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]}),
        text_config=Qwen2Config(**TEXT),
        image_token_id=IMAGE,
    )
    return built(InternVLForConditionalGeneration, config)


QWEN_TEXT = TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
QWEN_TOKENS = {"image_token_id": IMAGE, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}


def qwen2_vl() -> PreTrainedModel:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 7, "spatial_merge_size": 2}
    config = Qwen2VLConfig(vision_config=vision, text_config=QWEN_TEXT, **QWEN_TOKENS)
    return built(Qwen2VLForConditionalGeneration, config)


def qwen2_5_vl() -> PreTrainedModel:
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 7}
    vision |= {"out_hidden_size": 32, "window_size": 28, "fullatt_block_indexes": [1]}
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=QWEN_TEXT, **QWEN_TOKENS)
    return built(Qwen2_5_VLForConditionalGeneration, config)


def qwen3_vl() -> PreTrainedModel:
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 8}
    vision |= {"out_hidden_size": 32, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    # The second DeepStack features enter after the second layer, so a third layer must read them.
    config = Qwen3VLConfig(vision_config=vision, text_config=QWEN_TEXT | {"num_hidden_layers": 3}, **QWEN_TOKENS)
    return built(Qwen3VLForConditionalGeneration, config)


def idefics3() -> PreTrainedModel:
    config = Idefics3Config(vision_config=VISION, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2)
    return built(Idefics3ForConditionalGeneration, config)


def smolvlm() -> PreTrainedModel:
    config = SmolVLMConfig(vision_config=VISION, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2)
    return built(SmolVLMForConditionalGeneration, config)


def gemma3() -> PreTrainedModel:
    text = Gemma3TextConfig(**TEXT, sliding_window=16, layer_types=["sliding_attention", "full_attention"])
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=text,
        image_token_index=IMAGE,
        mm_tokens_per_image=4,
    )
    vlm = built(Gemma3ForConditionalGeneration, config)
    # It is initialised to 0, which would make all image features 0.
    torch.nn.init.normal_(vlm.model.multi_modal_projector.mm_input_projection_weight, std=0.2)
    return vlm


def paligemma() -> PreTrainedModel:
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False, projection_dim=32),
        text_config=GemmaConfig(**TEXT),
        image_token_index=IMAGE,
        projection_dim=32,
    )
    return built(PaliGemmaForConditionalGeneration, config)


def mistral3() -> PreTrainedModel:
    vision = PixtralVisionConfig(**VISION | {"image_size": 56, "patch_size": 7})
    config = Mistral3Config(
        vision_config=vision, text_config=MistralConfig(**TEXT), image_token_index=IMAGE, spatial_merge_size=2
    )
    return built(Mistral3ForConditionalGeneration, config)


FAMILIES = [
    Family("LLaVA-1.5", tiny.llava, square(CLIP_PROCESSOR)),
    Family("LLaVA-NeXT", tiny.llava_next, encode_llava_next),
    Family("LLaVA-OneVision", onevision, encode_onevision),
    Family("VipLLaVA", vipllava, square(CLIP_PROCESSOR)),
    Family("InternVL", internvl, encode_internvl),
    Family("Qwen2-VL", qwen2_vl, encode_qwen(7), "mm_token_type_ids"),
    Family("Qwen2.5-VL", qwen2_5_vl, encode_qwen(7), "mm_token_type_ids"),
    Family("Qwen3-VL", qwen3_vl, encode_qwen(8), "mm_token_type_ids"),
    Family("Idefics3", idefics3, encode_idefics3),
    Family("SmolVLM", smolvlm, encode_idefics3),
    Family("Gemma 3", gemma3, square(SIGLIP_PROCESSOR, 4), "token_type_ids"),
    Family("PaliGemma", paligemma, square(SIGLIP_PROCESSOR), "token_type_ids"),
    Family("Mistral 3", mistral3, encode_mistral3),
]


def pictures(seed: int, count: int) -> list[Image.Image]:
    """Pictures of noise in different sizes."""
    generator = np.random.default_rng(seed)
    shapes = [SIZES[(seed + index) % len(SIZES)] for index in range(count)]
    return [Image.fromarray(generator.integers(1, 255, (*shape, 3), dtype=np.uint8)) for shape in shapes]


def batch(family: Family, num_images: list[int], padding_side: str = "right", seed: int = 0) -> dict[str, torch.Tensor]:
    """Batch of a sample per number of images: words, images with words between, words; the last 5 supervised."""
    samples = [pictures(seed + index, count) for index, count in enumerate(num_images)]
    inputs, placeholders = family.encode(samples) if any(num_images) else ({}, [[] for _ in samples])
    rows = []
    for index, images in enumerate(placeholders):
        words = torch.randint(9, 60, (20,), generator=torch.Generator().manual_seed(seed + index)).tolist()
        between = [
            token for place, image in enumerate(images) for token in [*image, *words[6 + 2 * place : 8 + 2 * place]]
        ]
        rows.append([1, *words[: 4 + (seed + index) % 3], *between, *words[12:]])
    length = max(map(len, rows))

    def pad(values: list[int], padding: int) -> list[int]:
        fill = [padding] * (length - len(values))
        return values + fill if padding_side == "right" else fill + values

    input_ids = torch.tensor([pad(row, PAD) for row in rows])
    inputs = inputs | {
        "input_ids": input_ids,
        "attention_mask": torch.tensor([pad([1] * len(row), 0) for row in rows]),
        "labels": torch.tensor([pad([-100] * (len(row) - 5) + row[-5:], -100) for row in rows]),
    }
    if family.token_types == "mm_token_type_ids" or family.name == "Gemma 3":
        inputs[family.token_types] = (input_ids == IMAGE).int()
    elif family.token_types:
        # PaliGemma: the answer has type 1; tokens before it attend to each other in both directions.
        inputs[family.token_types] = (inputs["labels"] != -100).int()
    return inputs
