"""Visual token pruning methods: one file each, one contract, one dict.

`dualspeed.pruners.contract` defines what a pruner receives and returns; `selection`, `similarity` and `merging` hold
the tensor operations that methods share.
"""

from importlib import import_module

from dualspeed.errors import UnknownPrunerError
from dualspeed.pruners.contract import MergedTokens, Pruner, VisualTokens
from dualspeed.pruners.selection import select_top_k
from dualspeed.settings.budget import num_tokens_to_keep
from dualspeed.settings.names import PRUNER_LABELS

PRUNERS: dict[str, Pruner] = {name: import_module(f"dualspeed.pruners.{name}").PRUNER for name in PRUNER_LABELS}
"""Every pruner by its name; `PRUNERS[name](tokens, num_keep)` prunes a batch of images."""


def get_pruner(name: str) -> Pruner:
    """Look up a pruner; UnknownPrunerError lists the valid names."""
    if name not in PRUNERS:
        raise UnknownPrunerError(f"unknown pruner {name!r}; valid: {', '.join(sorted(PRUNERS))}")
    return PRUNERS[name]


__all__ = ["PRUNERS", "MergedTokens", "Pruner", "VisualTokens", "get_pruner", "num_tokens_to_keep", "select_top_k"]
