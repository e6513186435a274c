"""Visual token pruning methods: one file each, one contract, one dict.

B images, N visual tokens per image (padded to the longest), D width of the language model, K tokens kept.
"""

from dualspeed.pruners.divprune import divprune
from dualspeed.pruners.fastervlm import fastervlm
from dualspeed.pruners.random import random
from dualspeed.pruners.tokens import VisualTokens, num_tokens_to_keep, select_top_k

# name -> (tokens: VisualTokens, num_keep: (B,) integers) -> indices (B, K), K = num_keep.max(), ascending in each row.
# Row b holds num_keep[b] unique valid indices; what is left of a shorter row is filled with -1 at its end.
# A pruner is pure and batched: an image is pruned alike alone and among others. It works in float32 and breaks ties
# by the lower index. What it needs beside the features it lists in `<function>.needs` (fields of VisualTokens).
PRUNERS = {"divprune": divprune, "fastervlm": fastervlm, "random": random}


def get_pruner(name: str):
    """The pruner called `name`; the error of an unknown one lists the valid names."""
    if name not in PRUNERS:
        raise KeyError(f"unknown pruner {name!r}; valid: {', '.join(sorted(PRUNERS))}")
    return PRUNERS[name]


__all__ = ["PRUNERS", "VisualTokens", "get_pruner", "num_tokens_to_keep", "select_top_k"]
