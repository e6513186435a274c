"""PixelPrune (arXiv 2604.00886): squares of patches whose pixels their neighbours predict never enter the vision tower.

For towers that take the patches of all images in one sequence, merge square by merge square, with the patches'
positions, order by window and lengths as arguments. The rule is that of JPEG-LS: a square X with the neighbours

    C B
    A X

is predicted by A, unless C resembles A and not B: then by B. It stays if the largest difference between its pixels and
the predicted ones exceeds the tolerance. The first square of an image always stays; the first row and the first column
look along themselves. A neighbour that was left out counts as the square that predicted it, so that differences don't
add up along a gradient.

Differences from OPPO-Mente-Lab/PixelPrune: pixels are compared as the tower gets them, normalised by the processor, not
in [0, 1]; and each picture of a batch is scanned along its diagonals, all pictures at once, not square by square.

S squares of a batch, in reading order; K of them stay; m patches on a side of a square; V numbers in a square.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from dualspeed.method.host_counts import to_device, to_host
from dualspeed.method.vlm.families import family_of
from dualspeed.method.vlm.parts import vision_tower


@dataclass(frozen=True)
class KeptSquares:
    """Squares that stay, on the host."""

    indices: Tensor
    """(K,) their positions among the S squares, ascending."""
    before: list[int]
    """Squares of each image."""
    after: list[int]
    """Squares of each image that stay."""


class Neighbours(NamedTuple):
    """Neighbours of each square, (S,) positions on the device of the pixels; a missing one is the square itself."""

    left: Tensor
    up: Tensor
    diagonals: list[Tensor]
    """Squares of each diagonal, row + column = 0, 1, ..., of all pictures."""


def prune_pixels(
    vlm: PreTrainedModel, images: dict[str, Tensor], grids: Sequence[Sequence[int]], tolerance: float
) -> tuple[dict[str, Tensor], KeptSquares]:
    """Leave out the squares that their neighbours predict. One host-device sync.

    Args:
        images: inputs of the model's `get_image_features`.
        grids: its `image_grid_thw` on the host: frames, rows and columns of patches of each image.
        tolerance: largest difference between pixels that are taken for equal.

    Returns:
        the inputs with the squares that stay, and these squares.
    """
    side = vlm.config.vision_config.spatial_merge_size
    pixels = images["pixel_values"]
    squares = pixels.unflatten(0, (-1, side**2))
    shapes = [(rows // side, columns // side) for frames, rows, columns in grids for _ in range(frames)]
    is_kept = kept_squares(squares.flatten(1), neighbours(shapes, pixels), tolerance)
    is_kept = to_host([is_kept])[0].bool()
    before = [frames * rows * columns // side**2 for frames, rows, columns in grids]
    kept = KeptSquares(
        indices=is_kept.nonzero()[:, 0],
        before=before,
        after=[int(of_image.sum()) for of_image in is_kept.split(before)],
    )
    pruned = {
        "pixel_values": squares[to_device(kept.indices, pixels)].flatten(0, 1),
        # An image of K squares in one row, as far as its features are counted; on the CPU, where that is done.
        "image_grid_thw": torch.tensor([[1, side, side * count] for count in kept.after]),
    }
    arguments = tower_arguments(vlm, torch.tensor(grids), is_kept, [rows * columns for rows, columns in shapes])
    on_device = {name: values.to(pixels.device, non_blocking=True) for name, values in arguments.items()}
    return {**images, **pruned, **on_device}, kept


def neighbours(shapes: Sequence[tuple[int, int]], like: Tensor) -> Neighbours:
    """Neighbours of the squares of pictures.

    Args:
        shapes: rows and columns of squares of each picture.
        like: tensor on the device.
    """
    rows = torch.cat([torch.arange(height).repeat_interleave(width) for height, width in shapes])
    columns = torch.cat([torch.arange(width).repeat(height) for height, width in shapes])
    widths = torch.tensor([width for _, width in shapes]).repeat_interleave(
        torch.tensor([height * width for height, width in shapes])
    )
    places = torch.arange(len(rows))
    order = (rows + columns).argsort(stable=True)
    return Neighbours(
        left=to_device(places - (columns > 0).long(), like),
        up=to_device(places - widths * (rows > 0), like),
        diagonals=list(to_device(order, like).split((rows + columns).bincount().tolist())),
    )


def kept_squares(squares: Tensor, around: Neighbours, tolerance: float) -> Tensor:
    """(S,) bool, True for squares that stay.

    Args:
        squares: (S, V) pixels.
        tolerance: as in `prune_pixels`.
    """
    if tolerance == 0:
        return kept_of_equal(squares, around)
    left, up, diagonals = around
    places = torch.arange(len(squares), device=squares.device)
    inner = (left != places) & (up != places)
    stands_for = places.clone()
    """The square that each one's pixels are taken from."""

    def resembles(one: Tensor, other: Tensor) -> Tensor:
        return (squares[one].float() - squares[other].float()).abs().amax(dim=1) <= tolerance

    for here in diagonals[1:]:
        a, b, c = stands_for[left[here]], stands_for[up[here]], stands_for[up[left[here]]]
        takes_b = (inner[here] & resembles(c, a) & ~resembles(c, b)) | (left[here] == here)
        predicted = torch.where(takes_b, b, a)
        stands_for[here] = torch.where(resembles(here, predicted), predicted, here)
    return stands_for == places


def kept_of_equal(squares: Tensor, around: Neighbours) -> Tensor:
    """`kept_squares` without tolerance, at once: a square equals whatever it stands for."""
    left, up, diagonals = around
    places = torch.arange(len(squares), device=squares.device)
    equals_left, equals_up = ((squares == squares[neighbour]).all(dim=1) for neighbour in (left, up))
    inner = (left != places) & (up != places)
    takes_b = (inner & equals_up[left] & ~equals_left[up]) | (left == places)
    is_kept = ~torch.where(takes_b, equals_up, equals_left)
    return is_kept.index_fill(0, diagonals[0], True)


def tower_arguments(vlm: PreTrainedModel, grids: Tensor, is_kept: Tensor, sizes: Sequence[int]) -> dict[str, Tensor]:
    """Arguments that the tower would compute from `image_grid_thw`, for the squares that stay; on the host.

    Args:
        grids: (images, 3) frames, rows and columns of patches.
        is_kept: (S,) bool.
        sizes: squares of each picture.
    """
    vision, tower = vlm.config.vision_config, vision_tower(vlm)
    side = vision.spatial_merge_size
    patches = is_kept.repeat_interleave(side**2)
    arguments = {
        "position_ids": get_vision_position_ids(grids, side)[patches],
        "cu_seqlens": boundaries(is_kept, sizes, side**2),
    }
    if hasattr(tower, "pos_embed"):
        taps, weights = get_vision_interpolation_indices_and_weights(
            grids,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=side,
        )
        arguments |= {"interp_indices": taps[patches], "interp_weights": weights[patches]}
    if family_of(vlm).orders_by_window:
        order, ends = get_vision_window_index(grids, side, vision.window_size, vision.patch_size)
        in_order = is_kept[order]
        arguments["window_index"] = (is_kept.cumsum(0) - 1)[order[in_order]]
        arguments["cu_window_seqlens"] = boundaries(in_order, (ends.diff() // side**2).tolist(), side**2)
    return arguments


def boundaries(is_kept: Tensor, sizes: Sequence[int], patches_of_square: int) -> Tensor:
    """(parts + 1,) int32 boundaries of the parts of a sequence, counted in patches that stay, without empty parts.

    Args:
        is_kept: (S,) bool, in the order of the sequence.
        sizes: squares of each part.
    """
    counts = torch.stack([part.sum() for part in is_kept.split(list(sizes))]) * patches_of_square
    return F.pad(counts[counts > 0].cumsum(0), (1, 0)).int()
