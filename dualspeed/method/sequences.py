"""Sequence surgery: from a batch with every image placeholder to one with those of the kept tokens alone."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from dualspeed.batch import IGNORE_INDEX
from dualspeed.errors import SampleError


class Sequences(NamedTuple):
    """A batch of samples as token sequences, padded to the longest."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor | None
    by_token: Mapping[str, Tensor] = MappingProxyType({})
    """(..., B, L) what else belongs to tokens: position_ids, token_type_ids."""
    question_ids: Tensor | None = None
    """(B, Q) what the user asks, for pruners that go by it (dualspeed.method.relevance)."""


def mask_for_attention(inputs: Sequences) -> Tensor | None:
    """The attention mask, or None where attention is right without one, and quicker: fused causal kernels take none.

    Padding behind a sample's tokens lies in the future of all of them, so that causal attention never sees it. Where
    tokens carry more than their ids, attention may be something else than causal.
    """
    if inputs.by_token:
        return inputs.attention_mask
    mask = inputs.attention_mask.bool()
    starts_again = mask[:, 1:] & ~mask[:, :-1]
    # One question to the device: each waits for all that was launched before.
    return inputs.attention_mask if (starts_again.any() | ~mask[:, 0].all()).item() else None


def prune_inputs(inputs: Sequences, image_token_id: int, num_copies: Tensor, padding_side: str = "right") -> Sequences:
    """Compact sequences to the visual tokens that stay.

    Args:
        inputs: (B, L) with all tokens; those of images are `image_token_id`.
        num_copies: (P,) how many positions each image placeholder becomes, in reading order: 0 drops it, 1 keeps it,
            1 + l keeps it with room for the isolator before it.

    Raises:
        ValueError: placeholders and visual tokens differ in number.
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
        # The isolator's places take over what belongs to the token after them, its position among others.
        by_token={name: compact(values, 0) for name, values in by_token.items()},
    )
