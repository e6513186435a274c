"""Numbers of a batch that the host has to know, read from the device in one copy: each waits for all launched kernels.

B samples, L length, Q tokens of the longest question.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dualspeed.batch import IGNORE_INDEX, QUESTION_PADDING

if TYPE_CHECKING:
    from dualspeed.method.sequences import Sequences

HOST_INPUTS = ("image_sizes", "batch_num_images")
"""Inputs of vision towers that transformers reads on the host, number by number."""


class RowCounts(NamedTuple):
    """Numbers of a batch's rows; a list has one entry a row."""

    tokens: list[int]
    """Tokens that are attended to."""
    placeholders: list[int]
    """Image placeholders among them."""
    supervised: list[int]
    """Supervised labels, but for the first position's."""
    question_tokens: list[int]
    """Tokens in `question_ids`; 0 without them."""
    padded_behind: bool
    """True if no row has padding before a token."""
    grids: tuple[tuple[int, ...], ...] = ()
    """Frames, rows and columns of patches of each image, its `image_grid_thw`; empty for models without it."""


def read_counts(
    inputs: "Sequences", image_token_id: int, images: Mapping[str, Tensor]
) -> tuple[RowCounts, dict[str, Tensor]]:
    """Count a batch's rows, with one host-device sync, and copy HOST_INPUTS to the CPU with the same one.

    Returns:
        the counts, and `images` with HOST_INPUTS on the CPU.
    """
    of_images = [name for name in HOST_INPUTS if name in images]
    grids = images.get("image_grid_thw", inputs.input_ids.new_zeros(0, 3))
    numbers = [row_numbers(inputs, image_token_id), grids, *(images[name] for name in of_images)]
    per_row, grids, *on_host = to_host(numbers)
    tokens, placeholders, supervised, question_tokens, padded_behind = per_row.T.tolist()
    grids_of_images = tuple(map(tuple, grids.tolist()))
    counts = RowCounts(tokens, placeholders, supervised, question_tokens, all(padded_behind), grids_of_images)
    return counts, {**images, **dict(zip(of_images, on_host, strict=True))}


def row_numbers(inputs: "Sequences", image_token_id: int) -> Tensor:
    """(B, 5) int64: the fields of RowCounts."""
    mask = inputs.attention_mask.bool()
    none = torch.zeros_like(mask)
    supervised = none if inputs.labels is None else inputs.labels != IGNORE_INDEX
    questions = none if inputs.question_ids is None else inputs.question_ids != QUESTION_PADDING
    padded_behind = mask[:, 0] & ~(mask[:, 1:] & ~mask[:, :-1]).any(dim=1)
    counted = (mask, mask & (inputs.input_ids == image_token_id), supervised[:, 1:], questions)
    return torch.stack([*(values.sum(dim=1) for values in counted), padded_behind.long()], dim=1)


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors of integers to the CPU, as int64, with one host-device sync for all of them."""
    flat = torch.cat([tensor.long().flatten() for tensor in tensors]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def to_device(numbers: Sequence[int] | Tensor, like: Tensor) -> Tensor:
    """Integers of the host on the device of `like`, without waiting for the copy."""
    return torch.as_tensor(numbers, dtype=torch.long).to(like.device, non_blocking=True)
