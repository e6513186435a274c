"""Merging of tokens as weighted sums of features.

B images, N visual tokens per image, K tokens kept, D width of the features. Weights are (B, K, N): row k holds the
share of every token in the k-th kept vector.
"""

import torch
from torch import Tensor

from dualspeed.pruners.contract import MergedTokens


def one_hot(indices: Tensor, num_tokens: int) -> Tensor:
    """(B, K) indices -> (B, K, N) float32 weights that copy the tokens at these indices; all 0 for -1."""
    return (indices[:, :, None] == torch.arange(num_tokens, device=indices.device)).float()


def mean_weights(indices: Tensor, owners: Tensor) -> Tensor:
    """(B, K, N) float32 weights of the mean over the tokens that each kept token owns; all 0 if it owns none.

    Args:
        indices: (B, K) kept tokens, -1 for none.
        owners: (B, N) index of the kept token that each token belongs to, -1 for none.
    """
    is_owned = ((indices[:, :, None] == owners[:, None, :]) & (indices >= 0)[:, :, None]).float()
    return is_owned / is_owned.sum(dim=-1, keepdim=True).clamp(min=1)


def merge(features: Tensor, indices: Tensor, weights: Tensor) -> MergedTokens:
    """Merge `features` (B, N, D) with `weights` (B, K, N), in float32, to the vectors at `indices` (B, K)."""
    return MergedTokens(indices, (weights @ features.float()).to(features.dtype))
