"""Sequences on their way into the language model: when attention needs no mask."""

import torch

from dualspeed.method.sequences import Sequences, mask_for_attention


def sequences(*rows: str, **by_token: torch.Tensor) -> Sequences:
    """A batch whose rows are spelled with x for a token and - for padding."""
    mask = torch.tensor([[int(letter == "x") for letter in row] for row in rows])
    return Sequences(torch.zeros_like(mask), mask, None, by_token)


def test_padding_behind_the_tokens_needs_no_mask():
    assert mask_for_attention(sequences("xxxx", "xx--", "x---")) is None
    assert mask_for_attention(sequences("xxxx")) is None


def test_padding_before_or_between_the_tokens_needs_one():
    for row in ("--xx", "x-xx", "----"):
        batch = sequences("xxxx", row)
        assert mask_for_attention(batch) is batch.attention_mask


def test_tokens_with_types_keep_theirs():
    batch = sequences("xxx-", token_type_ids=torch.zeros(1, 4))
    assert mask_for_attention(batch) is batch.attention_mask
