"""Attention that reads cumulative lengths, as flash attention's varlen functions do, and runs on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

STAND_IN = "flash_stand_in"
"""Its name; `attn_implementation` of a language model."""


def by_lengths(module, query, key, value, attention_mask, scaling, cu_seq_lens_q=None, max_length_q=None, **kwargs):
    """Attention of each row by itself, by cumulative lengths alone, as flash attention's varlen functions."""
    assert attention_mask is None and query.shape[:1] == (1,)
    ends = cu_seq_lens_q.tolist()
    assert cu_seq_lens_q.dtype == torch.int32 and ends[-1] == query.shape[2]
    assert max(end - start for start, end in pairwise(ends)) == max_length_q
    groups = query.shape[1] // key.shape[1]
    key, value = (values.repeat_interleave(groups, dim=1) for values in (key, value))
    rows = [
        F.scaled_dot_product_attention(
            *(values[:, :, start:end] for values in (query, key, value)), is_causal=True, scale=scaling
        )
        for start, end in pairwise(ends)
    ]
    by_lengths.calls += 1
    return torch.cat(rows, dim=2).transpose(1, 2), None


by_lengths.calls = 0


@contextmanager
def attention_by_lengths() -> Iterator[None]:
    """Register it; `by_lengths.calls` counts from 0."""
    by_lengths.calls = 0
    ALL_ATTENTION_FUNCTIONS.register(STAND_IN, by_lengths)
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS._global_mapping[STAND_IN]


def use(vlm: PreTrainedModel, implementation: str) -> None:
    """Attention of the language model alone, as `attn_implementation={"text_config": ...}` sets it."""
    vlm.config.get_text_config()._attn_implementation = implementation
