"""Sequence surgery: shorten a batch of token sequences to the visual tokens that are kept."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from dualspeed.batch import IGNORE_INDEX
from dualspeed.errors import SampleError


class Sequences(NamedTuple):
    """Batch of token sequences, padded to the longest: (B, L) each."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor | None
    by_token: Mapping[str, Tensor] = MappingProxyType({})
    """(..., B, L) further inputs with one value per token: position_ids, token_type_ids."""
    question_ids: Tensor | None = None
    """(B, Q) tokens of the user's text, for pruners that need it (dualspeed.method.relevance)."""


def mask_for_attention(inputs: Sequences) -> Tensor | None:
    """Attention mask, or None if causal attention is correct without it, which allows faster fused kernels.

    Padding on the right lies in the future of all of a sample's tokens, so causal attention never sees it. With further
    inputs by token, attention may not be causal.
    """
    if inputs.by_token:
        return inputs.attention_mask
    mask = inputs.attention_mask.bool()
    starts_again = mask[:, 1:] & ~mask[:, :-1]
    # One host-device sync.
    return inputs.attention_mask if (starts_again.any() | ~mask[:, 0].all()).item() else None


def prune_inputs(inputs: Sequences, image_token_id: int, num_copies: Tensor, padding_side: str = "right") -> Sequences:
    """Shorten sequences to the visual tokens that are kept.

    Args:
        inputs: (B, L) sequences with all tokens; image tokens are `image_token_id`.
        num_copies: (P,) number of positions that each image placeholder becomes, in reading order: 0 drops it, 1 keeps
            it, 1 + l keeps it with l positions for the isolator before it.
        padding_side: side on which the shortened sequences are padded.

    Raises:
        SampleError: placeholders and visual tokens differ in number.
    """
    input_ids, attention_mask, labels, by_token, _ = inputs
    is_image = (input_ids == image_token_id) & attention_mask.bool()
    num_placeholders = int(is_image.sum())
    if num_placeholders != len(num_copies):
        raise SampleError(
            f"input_ids hold {num_placeholders} image placeholders, but the images give {len(num_copies)} visual tokens"
        )
    copies = attention_mask.long().masked_scatter(is_image, num_copies.long())
    lengths = copies.sum(dim=1)
    length, total = torch.stack([lengths.max(), lengths.sum()]).tolist()
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
    )
