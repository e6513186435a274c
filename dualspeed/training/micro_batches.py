"""Splitting of a batch into micro-batches, because slow steps need the memory of all tokens, fast ones of a tenth."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from dualspeed.batch import INPUTS_PER_IMAGE, TOKEN_INPUTS, TOWER_STATES
from dualspeed.errors import SampleError

PER_TOKEN = ("input_ids", "attention_mask", "labels", "positions_3d", *TOKEN_INPUTS)
"""Inputs with one number a token in their last dimension."""
Spans = list[tuple[int, int]]
"""Rows of an input: from the first number of each pair to the one before the second."""


def micro_batches(inputs: dict[str, Any], num_images: list[int], size: int) -> list[dict[str, Any]]:
    """Split a collated batch into parts of at most `size` samples in their order; as `parts_of` otherwise."""
    return list(parts_of(inputs, num_images, in_order(len(inputs["input_ids"]), size)))


def in_order(num_samples: int, size: int) -> list[list[int]]:
    """Groups of at most `size` samples, in the order of the batch."""
    return [list(range(start, min(start + size, num_samples))) for start in range(0, num_samples, size)]


def parts_of(
    inputs: dict[str, Any],
    num_images: Sequence[int],
    groups: Sequence[Sequence[int]],
    extents: Sequence[tuple[int, int]] | None = None,
) -> Iterator[dict[str, Any]]:
    """Parts of a collated batch, each with its own images.

    Args:
        inputs: one row a sample, padded to the longest, or one row an image (or patch), in reading order.
        num_images: (B,) number of images of each sample.
        groups: samples of each part.
        extents: (B,) columns of a sample's first token and behind its last one, to which parts are shortened; None:
            parts stay as wide as the batch.

    Raises:
        SampleError: `num_images` has another length than the batch, or the rows of `pixel_values` can't be assigned.
    """
    num_samples = len(inputs["input_ids"])
    if len(num_images) != num_samples:
        raise SampleError(f"num_images counts the images of {len(num_images)} samples, but the batch has {num_samples}")
    # Read once: every copy to the host waits for the accelerator.
    num_patches = inputs["image_grid_thw"].prod(dim=1).tolist() if "image_grid_thw" in inputs else None
    for group in groups:
        spans = {name: spans_of(name, inputs, num_images, num_patches, group) for name in inputs}
        part = {name: taken(inputs[name], found) for name, found in spans.items() if found or name == TOWER_STATES}
        if extents is not None:
            start, end = min(extents[row][0] for row in group), max(extents[row][1] for row in group)
            part |= {name: part[name][..., start:end] for name in PER_TOKEN if part.get(name) is not None}
        yield part


def taken(values: Any, spans: Spans) -> Any:
    """Rows of a tensor, of a list or of TowerStates; one span of them isn't copied."""
    parts = [values[start:end] for start, end in spans or [(0, 0)]]
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if isinstance(values, Tensor) else sum(parts[1:], parts[0])


def spans_of(
    name: str,
    inputs: dict[str, Any],
    num_images: Sequence[int],
    num_patches: list[int] | None,
    samples: Sequence[int],
) -> Spans:
    """Rows of the input `name` that belong to `samples`, in their order; none if it has no row for them.

    Args:
        num_patches: patches of each image, if `pixel_values` has one row a patch.
    """
    rows = merged((sample, sample + 1) for sample in samples)
    if name not in (*INPUTS_PER_IMAGE, "pixel_values"):
        return rows
    images = within(rows, num_images)
    if not images:
        return []
    num_rows = len(inputs[name])
    if name == "pixel_values" and num_patches is not None:
        return within(images, num_patches)
    if num_rows == sum(num_images):
        return images
    if num_rows == len(num_images):
        return rows
    raise SampleError(
        f"{name} has {num_rows} rows; valid: one an image ({sum(num_images)}) or one a sample ({len(num_images)})"
    )


def within(wholes: Spans, counts: Sequence[int]) -> Spans:
    """Parts that belong to these wholes, of which each has `counts` parts."""
    ends = list(accumulate(counts, initial=0))
    return merged((ends[start], ends[end]) for start, end in wholes)


def merged(spans: Iterable[tuple[int, int]]) -> Spans:
    """Spans without empty ones; those behind one another become one."""
    found: Spans = []
    for start, end in spans:
        if start == end:
            continue
        if found and found[-1][1] == start:
            start = found.pop()[0]
        found.append((start, end))
    return found
