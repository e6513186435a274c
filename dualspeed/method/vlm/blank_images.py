"""One blank image as each kind of model takes it: {input of `get_image_features`: values}, on the CPU in float32."""

import re
from importlib import import_module
from math import prod

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dualspeed.errors import ModelError
from dualspeed.method.vlm.encoder import accepted_inputs, body

PATCH_EMBEDDING = re.compile("patch_?embed|patch_conv|vision_tower.embeddings.proj")
"""Names of parameters that a patch's pixels are multiplied by."""


def conventional(vlm: PreTrainedModel) -> dict[str, Tensor]:
    """Blank image in the form that the names of the inputs of the model's `get_image_features` stand for.

    Raises:
        ModelError: none of the forms that models share.
    """
    accepted = accepted_inputs(vlm)
    for name, make in FORMS.items():
        if name in accepted:
            return make(vlm)
    if "image_sizes" in accepted:
        return square_in_tiles(vlm) if hasattr(vlm.config, "image_grid_pinpoints") else two_by_two_tokens(vlm)
    if accepted and image_side(vlm) is not None:
        return square(vlm)
    raise ModelError(f"its images come as {', '.join(accepted)}, and nothing says what a blank one looks like")


def image_side(vlm: PreTrainedModel, name: str = "vision_config") -> int | None:
    """Pixels on a side of the images that a tower of one resolution takes, the largest of a tower in parts."""
    config = getattr(vlm.config, name, None)
    configs = [config, *(getattr(config, part, None) for part in getattr(config, "sub_configs", ()))]
    sizes = [getattr(part, "image_size", None) for part in configs if part is not None]
    sides = [size if isinstance(size, int) else size[0] for size in sizes if size is not None]
    return max(sides, default=None) or timm_side(vlm)


def timm_side(vlm: PreTrainedModel) -> int | None:
    """As `image_side` for a tower of timm, which takes it from its own arguments or else its own record."""
    timm = getattr(getattr(body(vlm), "vision_tower", None), "timm_model", None)
    if timm is None:
        return None
    size = (vlm.config.vision_config.model_args or {}).get("img_size") or timm.pretrained_cfg["input_size"][-1]
    return size if isinstance(size, int) else size[0]


def square(vlm: PreTrainedModel) -> dict[str, Tensor]:
    """(1, 3, H, W), for towers of one resolution."""
    side = image_side(vlm) or 0
    return {"pixel_values": torch.zeros(1, 3, side, side)}


def small_square(vlm: PreTrainedModel) -> dict[str, Tensor]:
    """(1, 3, 128, 128), for towers of convolutions, which take any size."""
    return {"pixel_values": torch.zeros(1, 3, 128, 128)}


def square_in_two_resolutions(vlm: PreTrainedModel) -> dict[str, Tensor]:
    """(1, 3, H, W) for each of two towers."""
    side = image_side(vlm, "high_res_vision_config") or 0
    return square(vlm) | {"high_res_pixel_values": torch.zeros(1, 3, side, side)}


def square_and_question(vlm: PreTrainedModel) -> dict[str, Tensor]:
    """(1, 3, H, W) image and (1, 1) tokens of a question about it, which the Q-Former of InstructBLIP reads."""
    ids = torch.zeros(1, 1, dtype=torch.long)
    return square(vlm) | {"qformer_input_ids": ids, "qformer_attention_mask": torch.ones_like(ids)}


def square_in_tiles(vlm: PreTrainedModel) -> dict[str, Tensor]:
    """(1, tiles, 3, H, W) base tile and tiles of a square image, for any-resolution LLaVAs."""
    module = import_module(type(vlm).__module__)
    side = vlm.config.vision_config.image_size
    num_tiles = module.image_size_to_num_patches([side, side], vlm.config.image_grid_pinpoints, side)
    return {"pixel_values": torch.zeros(1, num_tiles, 3, side, side), "image_sizes": torch.tensor([[side, side]])}


def patches_of_one_token(vlm: PreTrainedModel) -> dict[str, Tensor]:
    """(patches, C) patches that become one token, for the Qwen-VL families and all that take `image_grid_thw`."""
    side = merge_side(vlm)
    return {
        "pixel_values": torch.zeros(side * side, prod(patch_shape(vlm))),
        "image_grid_thw": torch.tensor([[1, side, side]]),
    }


def unflattened_patches(vlm: PreTrainedModel) -> dict[str, Tensor]:
    """As `patches_of_one_token`, for models that take the pixels of a patch in their shape."""
    patches = patches_of_one_token(vlm)
    return patches | {"pixel_values": patches["pixel_values"].unflatten(1, patch_shape(vlm))}


def square_of_patches(vlm: PreTrainedModel) -> dict[str, Tensor]:
    """(1, 2m, 2m, C) pixels of the one token that a square of patches becomes, channels last, for Inkling 2."""
    vision = vlm.config.vision_config
    side = vision.spatial_merge_size * vision.patch_size
    return {
        "pixel_values": torch.zeros(1, side, side, vision.num_channels),
        "image_grid_thw": torch.tensor([[1, 1, 1]]),
    }


def patch_in_time(vlm: PreTrainedModel) -> dict[str, Tensor]:
    """(1, T, H, W, C) patch that becomes one token, channels last, for Inkling."""
    vision = vlm.config.vision_config
    shape = (1, vision.temporal_patch_size, vision.patch_size, vision.patch_size, vision.num_channels)
    return {"pixel_values": torch.zeros(shape)}


def patches_with_merge_size(vlm: PreTrainedModel) -> dict[str, Tensor]:
    """(1, C) a patch that becomes one token, with the side of its merge square, for VideoLLaMA 3."""
    row = torch.zeros(1, prod(patch_shape(vlm)))
    return {
        "pixel_values": row,
        "image_grid_thw": torch.tensor([[1, 1, 1]]),
        "image_merge_sizes": torch.tensor([1]),
    }


def patches_in_rows(vlm: PreTrainedModel) -> dict[str, Tensor]:
    """(4, C) patches that become one token, and the (1, 2) patches on its sides, for Nemotron Omni."""
    return {
        "pixel_values": torch.zeros(4, vlm.config.vision_config.patch_dim),
        "image_grid_hw": torch.tensor([[2, 2]]),
    }


def patches_in_strip(vlm: PreTrainedModel) -> dict[str, Tensor]:
    """(1, 3, p, 16 p) patches side by side that become one token, and the (1, 2) grid of them, for MiniCPM-V."""
    size = vlm.config.vision_config.patch_size
    return {"pixel_values": torch.zeros(1, 3, size, 16 * size), "target_sizes": torch.tensor([[4, 4]])}


def patches_with_shape(vlm: PreTrainedModel) -> dict[str, Tensor]:
    """(1, patches, C) patches of one token, the (1, 2) patches on its sides and the mask of those in use, for LFM2."""
    vision, side = vlm.config.vision_config, vlm.config.downsample_factor
    return {
        "pixel_values": torch.zeros(1, side * side, vision.num_channels * vision.patch_size**2),
        "spatial_shapes": torch.tensor([[side, side]]),
        "pixel_attention_mask": torch.ones(1, side * side, dtype=torch.long),
    }


def patches_with_positions(vlm: PreTrainedModel) -> dict[str, Tensor]:
    """(1, patches, C) patches of one token with their (1, patches, 2) x and y, for Gemma 4."""
    vision = vlm.config.vision_config
    pooled = getattr(vision, "model_patch_size", None)  # of a model without tower, which takes whole squares
    side, patch = (vision.pooling_kernel_size, vision.patch_size) if pooled is None else (1, pooled)
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).view(1, -1, 2)
    return {"pixel_values": torch.zeros(1, side * side, 3 * patch**2), "image_position_ids": places.flip(-1)}


def crop_and_pooling(vlm: PreTrainedModel) -> dict[str, Tensor]:
    """(1, patches, C) crop, (1, 4) patches that are pooled to its one token, and (1, 4) its grid, for Molmo 2."""
    vision = vlm.config.vision_config
    num_patches = vision.num_position_embeddings
    return {
        "pixel_values": torch.zeros(1, num_patches, 3 * vision.patch_size**2),
        "image_token_pooling": torch.arange(4)[None],
        "image_grids": torch.tensor([[1, 1, 0, 0]]),
    }


def patches_alone(vlm: PreTrainedModel) -> dict[str, Tensor]:
    """(1, 4, C) patches that are a token each, for Fuyu, which has no tower."""
    return {"pixel_values": torch.zeros(1, 4, vlm.config.num_channels * vlm.config.patch_size**2)}


def tile_with_mask(vlm: PreTrainedModel) -> dict[str, Tensor]:
    """(1, 1, 3, H, W) tile and the (1, 1) mask that says that it is in use, for Granite Docling."""
    return square_of_tiles(vlm) | {"pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool)}


def square_of_tiles(vlm: PreTrainedModel) -> dict[str, Tensor]:
    """(1, 1, 3, H, W) an image of one tile."""
    side = image_side(vlm) or 0
    return {"pixel_values": torch.zeros(1, 1, 3, side, side)}


def merge_side(vlm: PreTrainedModel) -> int:
    """Patches on a side of the square that becomes a token."""
    vision = vlm.config.vision_config
    names = ("spatial_merge_size", "merge_size", "merge_kernel_size")
    found = [getattr(config, name) for config in (vision, vlm.config) for name in names if hasattr(config, name)]
    side = found[0] if found else 1
    return side if isinstance(side, int) else side[0]


def patch_shape(vlm: PreTrainedModel) -> torch.Size:
    """Shape of a patch's pixels, as the weights of the layer that embeds it have them: (channels, [frames,] h, w)."""
    weights = [p for name, p in body(vlm).named_parameters() if PATCH_EMBEDDING.search(name)]
    return next(shape_of(weight)[1:] for weight in weights if len(shape_of(weight)) > 1)


def shape_of(parameter: Tensor) -> torch.Size:
    """Shape of a parameter over all ranks; ZeRO-3 empties the parameter and notes its shape beside it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def tile_of_ones(vlm: PreTrainedModel) -> dict[str, Tensor]:
    """(1, 1, 3, H, W), for models to which a tile of zeros is padding."""
    side = vlm.config.vision_config.image_size
    return {"pixel_values": torch.ones(1, 1, 3, side, side)}


def two_by_two_tokens(vlm: PreTrainedModel) -> dict[str, Tensor]:
    """(1, 3, H, W) pixels of 2 x 2 tokens, for Mistral 3, which drops a dimension of a single token."""
    side = 2 * vlm.config.vision_config.patch_size * vlm.config.spatial_merge_size
    return {"pixel_values": torch.zeros(1, 3, side, side), "image_sizes": torch.tensor([[side, side]])}


FORMS = {
    "image_merge_sizes": patches_with_merge_size,
    "image_grid_thw": patches_of_one_token,
    "image_grid_hw": patches_in_rows,
    "target_sizes": patches_in_strip,
    "spatial_shapes": patches_with_shape,
    "image_position_ids": patches_with_positions,
    "image_token_pooling": crop_and_pooling,
    "high_res_pixel_values": square_in_two_resolutions,
    "qformer_input_ids": square_and_question,
}
"""Name of an input that only images of one form come with -> function that makes a blank one."""
