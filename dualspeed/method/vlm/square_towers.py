"""Fields that pruners read of towers that take the patches of all images in one sequence, merge square by merge square.

Such towers (the Qwen-VL families') rotate queries and keys by their positions, and a patch attends to the patches of
its own image, or of its window. A token's values are the means over the square of patches that becomes the token.

L patches, P tokens, H heads, d width of a head.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.vision_utils import get_vision_window_index

from dualspeed.method.vlm.families import family_of

ROUNDING = 1e-6
"""Share of the largest value below which a standard deviation is rounding."""
LARGEST_MAP = 2**26
"""Numbers in the largest piece of an attention map that is held at once."""


def heads_of(attention: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """(L, H, d) queries and keys of a layer whose projections are one matrix, before their rotation."""
    hidden_states = (
        hidden_states.to(attention.qkv.weight.dtype) if attention.qkv.weight.is_floating_point() else hidden_states
    )
    projected = attention.qkv(hidden_states).unflatten(-1, (3, attention.num_heads, -1))
    return projected[:, 0], projected[:, 1]


def received(attention: Any, queries: Tensor, keys: Tensor, positions: tuple[Tensor, Tensor], ends: Tensor) -> Tensor:
    """(L,) mean attention that each patch receives from the patches of its part of the sequence, mean over heads.

    Args:
        attention: an attention module of the tower.
        queries, keys: (L, H, d) as from `heads_of`.
        positions: cosine and sine of the rotation of each patch.
        ends: (parts + 1,) boundaries of the parts, images or windows, that attend to themselves alone.
    """
    rotate = import_module(type(attention).__module__).apply_rotary_pos_emb_vision
    queries, keys = rotate(queries.float(), keys.float(), *positions)
    lengths = ends.diff().tolist()
    parts = zip(queries.transpose(0, 1).split(lengths, dim=1), keys.transpose(0, 1).split(lengths, dim=1), strict=True)
    return torch.cat([mean_received(query, key, attention.scaling) for query, key in parts])


def mean_received(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """(L,) attention to each of (H, L, d) keys, mean over heads and queries, some rows of the map at a time."""
    num_heads, length, _ = keys.shape
    rows = max(1, LARGEST_MAP // (num_heads * max(length, 1)))
    total = keys.new_zeros(length)
    for piece in queries.split(rows, dim=1):
        total += (piece @ keys.transpose(1, 2) * scale).softmax(dim=-1).mean(dim=0).sum(dim=0)
    return total / max(length, 1)


def squares_of(vlm: PreTrainedModel, patches: Tensor) -> Tensor:
    """(L, ...) values of patches as the merger gets them -> (P, ...) means over its squares, in its order."""
    return patches.unflatten(0, (-1, vlm.config.vision_config.spatial_merge_size**2)).mean(dim=1)


def with_window_order(vlm: PreTrainedModel, images: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inputs of the tower, with the order by window, in towers that have one: read once for tower and tokens' fields.

    Reading it waits for the device, since it follows from the images' grids. Nothing changes if it is there, as where
    squares are left out.
    """
    if not family_of(vlm).orders_by_window or "window_index" in images:
        return images
    vision, grids = vlm.config.vision_config, images["image_grid_thw"]
    order, ends = get_vision_window_index(grids, vision.spatial_merge_size, vision.window_size, vision.patch_size)
    return images | {"window_index": order.to(grids.device, non_blocking=True), "cu_window_seqlens": ends}


def in_token_order(vlm: PreTrainedModel, squares: Tensor, images: dict[str, Tensor]) -> Tensor:
    """(P, ...) values in the order of the merger's squares -> in the order of the tokens.

    Args:
        images: inputs of the tower, as from `with_window_order`.
    """
    return squares[images["window_index"].argsort()] if family_of(vlm).orders_by_window else squares


def standardised_squares(vlm: PreTrainedModel, patches: Tensor, num_tokens: list[int]) -> Tensor:
    """(P, C) means over squares of patches that are divided, image by image, by their standard deviation.

    One dimension that is equal in all patches of an image, but for rounding, becomes 0.

    Args:
        patches: (L, C) as the merger gets them.
        num_tokens: tokens of each image.
    """
    side = vlm.config.vision_config.spatial_merge_size
    per_image = patches.float().split([side**2 * count for count in num_tokens])
    return torch.cat([squares_of(vlm, standardised(values)) for values in per_image])


def standardised(values: Tensor) -> Tensor:
    """(patches, C) values divided by the standard deviation of their column; 0 where it is but rounding."""
    deviation, largest = values.std(dim=0, correction=0), values.abs().amax(dim=0)
    return torch.where(deviation > ROUNDING * largest, values / deviation, 0.0)
