"""What a pruner sees of a batch of images, and the arithmetic all pruners share."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of B images, padded to the longest; only `features` is always there."""

    features: Tensor
    """(B, N, D) projected features, as the language model gets them."""
    mask: Tensor | None = None
    """(B, N) bool, True for tokens and False for padding; None: no padding."""
    cls_attention: Tensor | None = None
    """(B, N) attention from the vision tower's CLS token, mean over heads; -inf for tokens that have none."""
    seeds: Tensor | None = None
    """(B,) int64, one seed an image, for random methods."""

    def valid(self) -> Tensor:
        """(B, N) bool mask, also where none was given."""
        if self.mask is not None:
            return self.mask
        return torch.ones(self.features.shape[:2], dtype=torch.bool, device=self.features.device)


def num_tokens_to_keep(num_tokens: int, pruning_ratio: float) -> int:
    """k = max(1, floor((1 - p) N + 1e-6)); the epsilon because 1 - 0.9 is a little less than 0.1 in floats."""
    return max(1, math.floor((1 - pruning_ratio) * num_tokens + 1e-6))


def select_top_k(scores: Tensor, num_keep: Tensor) -> Tensor:
    """Indices of the `num_keep` highest scores of each row, ascending, ties to the lower index.

    Args:
        scores: (B, N); -inf marks tokens that can't be picked.
        num_keep: (B,) integers.

    Returns:
        (B, num_keep.max()) indices, shorter rows filled with -1 at the end.
    """
    by_score = scores.sort(dim=-1, descending=True, stable=True).indices[:, : int(num_keep.max())]
    return ascending(by_score, num_keep)


def ascending(picked: Tensor, num_keep: Tensor) -> Tensor:
    """Sort the first `num_keep` picks of each row (B, K) into image order and fill the rest of it with -1."""
    beyond = torch.iinfo(picked.dtype).max
    unused = torch.arange(picked.shape[1], device=picked.device) >= num_keep.to(picked.device)[:, None]
    ordered = picked.masked_fill(unused, beyond).sort(dim=-1).values
    return ordered.masked_fill(ordered == beyond, -1)
