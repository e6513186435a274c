"""Packing: the rows of a batch behind one another in one row without padding, with positions that start anew in each.

Attention stays within each row: flash attention is told their cumulative lengths, and for flex attention transformers
makes a mask of the positions.

B rows, L length of the padded batch, T tokens of all rows.
"""

from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from dualspeed.errors import ConfigError
from dualspeed.method.host_counts import to_device
from dualspeed.method.logits import run_vlm
from dualspeed.method.losses import supervised_positions
from dualspeed.method.sequences import Sequences
from dualspeed.method.vlm.families import FAMILIES, family_of, is_listed
from dualspeed.pruners.selection import true_places
from dualspeed.settings.attention import FLEX, check_reads_lengths

WITHIN_ROWS = {"full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of layers that positions and cumulative lengths keep within a row."""


class Packed(NamedTuple):
    """Rows of a batch behind one another."""

    input_ids: Tensor
    """(1, T)"""
    places: Tensor
    """(T,) places of the tokens among the B x L of the padded batch."""
    arguments: dict[str, Any]
    """Further arguments of the model: position_ids, other inputs by token, cumulative lengths."""


def pack(inputs: Sequences, has_3d_positions: bool) -> Packed:
    """Join the rows of a batch.

    Args:
        has_3d_positions: True for models that take positions in time, height and width behind those of the text.
    """
    lengths = inputs.counted(image_token_id=-1).tokens
    places = true_places(inputs.attention_mask.bool(), sum(lengths))

    def joined(values: Tensor) -> Tensor:
        return values.flatten(-2)[..., places].unsqueeze(-2)

    by_token = {name: joined(values) for name, values in inputs.by_token.items()}
    positions = to_device(torch.cat([torch.arange(length) for length in lengths]), inputs.input_ids)[None]
    if has_3d_positions:
        of_images = by_token.get("position_ids", positions.expand(3, 1, -1))
        positions = torch.cat([positions[None], of_images])
    ends = to_device(list(accumulate(lengths, initial=0)), inputs.input_ids).int()
    arguments = by_token | {
        "position_ids": positions,
        **{"cu_seq_lens_q": ends, "cu_seq_lens_k": ends},
        **{"max_length_q": max(lengths), "max_length_k": max(lengths)},
    }
    return Packed(joined(inputs.input_ids), places, arguments)


def packed_logits(vlm: PreTrainedModel, inputs: Sequences, images: ModelOutput | None) -> Tensor:
    """(M, V) logits at the positions that predict a supervised token, as `supervised_logits` gives them."""
    labels: Tensor = inputs.labels  # type: ignore[assignment]  # None in generation alone
    packed = pack(inputs, family_of(vlm).has_3d_positions)
    kept = supervised_positions(labels).flatten()[packed.places][None]
    return run_vlm(vlm, packed.input_ids, images, kept, attention_mask=None, **packed.arguments)


def check_packing(vlm: PreTrainedModel, device: torch.device) -> None:
    """Raise ConfigError for a model whose attention would mix the rows, or pay for all pairs of their tokens."""
    text = vlm.config.get_text_config()
    implementation = text._attn_implementation
    check_reads_lengths(implementation)
    if not is_listed(vlm) or not family_of(vlm).packs_rows:
        packing = [name for name, family in FAMILIES.items() if family.packs_rows]
        raise ConfigError(f"packing: {type(vlm).__name__} was not compared; valid: {', '.join(packing)}")
    if others := set(getattr(text, "layer_types", None) or ()) - WITHIN_ROWS:
        raise ConfigError(f"packing: layers of {sorted(others)[0]} would carry one row into the next; valid: False")
    if implementation == FLEX and device.type == "cpu":
        raise ConfigError("packing: flex_attention has no backward pass on a CPU; valid: a GPU, or packing=False")
    if implementation == FLEX and getattr(text, "attention_dropout", 0):
        raise ConfigError(
            f"packing: flex_attention has no dropout, and attention_dropout is {text.attention_dropout}; valid: 0"
        )
