"""Visual token pruning methods: one file each, one contract, one dict.

B images, N visual tokens per image (padded to the longest), D width of the language model, K tokens kept.
"""

from importlib import import_module
from typing import Protocol

from torch import Tensor

from dualspeed.errors import UnknownPrunerError
from dualspeed.pruners.contract import MergedTokens, VisualTokens, num_tokens_to_keep, select_top_k
from dualspeed.settings.names import PRUNER_LABELS


class Pruner(Protocol):
    """What PRUNERS holds."""

    needs: tuple[str, ...]

    def __call__(self, tokens: VisualTokens, num_keep: Tensor) -> Tensor | MergedTokens: ...


# name -> (tokens: VisualTokens, num_keep: (B,) integers) -> indices (B, K), K = num_keep.max(), ascending in each row.
# Row b holds num_keep[b] unique valid indices; what is left of a shorter row is filled with -1 at its end. A method
# that merges returns MergedTokens: such indices, and the vectors that stand there.
# A pruner is pure and batched: an image is pruned alike alone and among others. It works in float32 and breaks ties
# by the lower index; if it keeps all tokens, it changes none. Selection has no gradient, merged vectors have. What it
# needs beside the features it lists in `<function>.needs` (fields of VisualTokens). File and function bear its name.
PRUNERS: dict[str, Pruner] = {name: getattr(import_module(f"dualspeed.pruners.{name}"), name) for name in PRUNER_LABELS}


def get_pruner(name: str) -> Pruner:
    """The pruner called `name`; the error of an unknown one lists the valid names."""
    if name not in PRUNERS:
        raise UnknownPrunerError(f"unknown pruner {name!r}; valid: {', '.join(sorted(PRUNERS))}")
    return PRUNERS[name]


__all__ = ["PRUNERS", "MergedTokens", "VisualTokens", "get_pruner", "num_tokens_to_keep", "select_top_k"]
