"""Sequence surgery: shorten a batch of token sequences to the visual tokens that are kept."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dualspeed.batch import IGNORE_INDEX
from dualspeed.errors import SampleError
from dualspeed.method.host_counts import RowCounts, read_counts


class Sequences(NamedTuple):
    """Batch of token sequences, padded to the longest: (B, L) each."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor | None
    by_token: Mapping[str, Tensor] = MappingProxyType({})
    """(..., B, L) further inputs with one value per token: position_ids, token_type_ids."""
    question_ids: Tensor | None = None
    """(B, Q) tokens of the user's text, for pruners that need it (dualspeed.method.relevance)."""
    counts: RowCounts | None = None
    """Numbers of the rows, known to the host; None: read from the device where they are needed."""

    def counted(self, image_token_id: int) -> RowCounts:
        """Numbers of the rows, with one host-device sync if they aren't known yet."""
        return self.counts or read_counts(self, image_token_id, {})[0]


def with_counts(
    inputs: Sequences, image_token_id: int, images: Mapping[str, Tensor]
) -> tuple[Sequences, dict[str, Tensor]]:
    """Sequences with their counts, and `images` with HOST_INPUTS on the CPU: one host-device sync."""
    counts, images = read_counts(inputs, image_token_id, images)
    return inputs._replace(counts=counts), images


def mask_for_attention(inputs: Sequences) -> Tensor | None:
    """Attention mask, or None if causal attention is correct without it, which allows faster fused kernels.

    Padding on the right lies in the future of all of a sample's tokens, so causal attention never sees it. With further
    inputs by token, attention may not be causal.
    """
    if inputs.by_token:
        return inputs.attention_mask
    return None if inputs.counted(image_token_id=-1).padded_behind else inputs.attention_mask


def prune_inputs(
    inputs: Sequences,
    image_token_id: int,
    num_copies: Tensor,
    padding_side: str = "right",
    copies_per_image: Sequence[tuple[int, int]] | None = None,
) -> Sequences:
    """Shorten sequences to the visual tokens that are kept.

    Args:
        inputs: (B, L) sequences with all tokens; image tokens are `image_token_id`.
        num_copies: (P,) number of positions that each image placeholder becomes, in reading order: 0 drops it, 1 keeps
            it, 1 + l keeps it with l positions for the isolator before it.
        padding_side: side on which the shortened sequences are padded.
        copies_per_image: (placeholders, positions that they become) of each image, in reading order, from which the
            host knows the new lengths; None: read from `num_copies`, with one host-device sync.

    Raises:
        SampleError: placeholders and visual tokens differ in number.
    """
    input_ids, attention_mask, labels, by_token, *_ = inputs
    counts = inputs.counted(image_token_id)
    if sum(counts.placeholders) != len(num_copies):
        raise SampleError(
            f"input_ids hold {sum(counts.placeholders)} image placeholders, but the images give {len(num_copies)} "
            "visual tokens"
        )
    is_image = (input_ids == image_token_id) & attention_mask.bool()
    copies = attention_mask.long().masked_scatter(is_image, num_copies.long())
    lengths = copies.sum(dim=1)
    host_lengths = lengths.tolist() if copies_per_image is None else pruned_lengths(counts, copies_per_image)
    length, total = max(host_lengths), sum(host_lengths)
    positions = torch.arange(input_ids.numel(), device=input_ids.device)
    source = positions.repeat_interleave(copies.flatten(), output_size=total)
    row = source // input_ids.shape[1]
    column = torch.arange(len(source), device=input_ids.device) - (lengths.cumsum(0) - lengths)[row]
    if padding_side == "left":
        column = column + (length - lengths)[row]

    def compact(values: Tensor, padding: int) -> Tensor:
        compacted = values.new_full((*values.shape[:-1], length), padding)
        compacted[..., row, column] = values.flatten(-2)[..., source]
        return compacted

    return Sequences(
        input_ids=compact(input_ids, 0),
        attention_mask=compact(attention_mask, 0),
        labels=None if labels is None else compact(labels, IGNORE_INDEX),
        # The isolator's positions get the values of the token after them, its position_ids included.
        by_token={name: compact(values, 0) for name, values in by_token.items()},
        counts=pruned_counts(counts, host_lengths, padding_side),
    )


def pruned_counts(counts: RowCounts, lengths: list[int], padding_side: str) -> RowCounts:
    """Counts of the rows after pruning to these (B,) lengths; only placeholders are added or removed."""
    return counts._replace(
        tokens=lengths,
        placeholders=[
            placeholders + new - old
            for placeholders, new, old in zip(counts.placeholders, lengths, counts.tokens, strict=True)
        ],
        padded_behind=padding_side == "right" or min(lengths) == max(lengths),
    )


def pruned_lengths(counts: RowCounts, copies_per_image: Sequence[tuple[int, int]]) -> list[int]:
    """(B,) lengths of the rows after pruning.

    Args:
        copies_per_image: as in `prune_inputs`.

    Raises:
        SampleError: an image's visual tokens reach from one row's placeholders to the next row's.
    """
    images = iter(copies_per_image)
    lengths = []
    for row, (length, remaining) in enumerate(zip(counts.tokens, counts.placeholders, strict=True)):
        while remaining > 0:
            num_placeholders, num_positions = next(images)
            remaining -= num_placeholders
            length += num_positions - num_placeholders
        if remaining < 0:
            raise SampleError(
                f"sample {row} of the batch has {counts.placeholders[row]} image placeholders, which its images' "
                f"visual tokens exceed by {-remaining}"
            )
        lengths.append(length)
    return lengths


def placeholder_runs(inputs: Sequences, image_token_id: int) -> list[int]:
    """Lengths of the runs of placeholders, in reading order; one host-device sync."""
    is_image = F.pad((inputs.input_ids == image_token_id) & inputs.attention_mask.bool(), (1, 1)).int()
    starts, ends = (is_image.diff(dim=1) == 1).nonzero()[:, 1], (is_image.diff(dim=1) == -1).nonzero()[:, 1]
    return (ends - starts).tolist()
