"""One blank image as each kind of model takes it: {input of `get_image_features`: values}, on the CPU in float32."""

from importlib import import_module

import torch
from torch import Tensor
from transformers import PreTrainedModel


def square(vlm: PreTrainedModel) -> dict[str, Tensor]:
    """(1, 3, H, W), for towers of one resolution."""
    size = vlm.config.vision_config.image_size
    side = size if isinstance(size, int) else size[0]
    return {"pixel_values": torch.zeros(1, 3, side, side)}


def square_in_tiles(vlm: PreTrainedModel) -> dict[str, Tensor]:
    """(1, tiles, 3, H, W) base tile and tiles of a square image, for any-resolution LLaVAs."""
    module = import_module(type(vlm).__module__)
    side = vlm.config.vision_config.image_size
    num_tiles = module.image_size_to_num_patches([side, side], vlm.config.image_grid_pinpoints, side)
    return {"pixel_values": torch.zeros(1, num_tiles, 3, side, side), "image_sizes": torch.tensor([[side, side]])}


def patches_of_one_token(vlm: PreTrainedModel) -> dict[str, Tensor]:
    """(patches, C) patches that become one token, for the Qwen-VL families."""
    vision = vlm.config.vision_config
    side = vision.spatial_merge_size
    channels = getattr(vision, "in_channels", 3)
    width = channels * vision.temporal_patch_size * vision.patch_size**2
    return {"pixel_values": torch.zeros(side * side, width), "image_grid_thw": torch.tensor([[1, side, side]])}


def tile_of_ones(vlm: PreTrainedModel) -> dict[str, Tensor]:
    """(1, 1, 3, H, W), for models to which a tile of zeros is padding."""
    side = vlm.config.vision_config.image_size
    return {"pixel_values": torch.ones(1, 1, 3, side, side)}


def two_by_two_tokens(vlm: PreTrainedModel) -> dict[str, Tensor]:
    """(1, 3, H, W) pixels of 2 x 2 tokens, for Mistral 3, which drops a dimension of a single token."""
    side = 2 * vlm.config.vision_config.patch_size * vlm.config.spatial_merge_size
    return {"pixel_values": torch.zeros(1, 3, side, side), "image_sizes": torch.tensor([[side, side]])}
