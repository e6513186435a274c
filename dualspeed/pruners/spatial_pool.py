"""Average pooling (LLaVolta, arXiv 2406.20092, Beckschen/LLaVolta)."""

import torch
from torch import Tensor

from dualspeed.pruners.contract import MergedTokens, VisualTokens, averages, first, members, merge, positions_of


def spatial_pool(tokens: VisualTokens, num_keep: Tensor) -> MergedTokens:
    """The means of k stretches of the image in raster order, as equal in length as they can be.

    LLaVolta pools with a kernel of a whole number of tokens (`AvgPool1d`); stretches whose lengths differ by one allow
    any k. A mean stands where its stretch begins.
    """
    indices, weights = stretches(tokens, num_keep)
    return merge(tokens.features, indices, weights)


spatial_pool.needs = ()


@torch.no_grad()
def stretches(tokens: VisualTokens, num_keep: Tensor) -> tuple[Tensor, Tensor]:
    """(B, K) first token of each stretch, and (B, K, N) weights of its mean."""
    valid = tokens.valid()
    num_tokens, counts = valid.sum(dim=1, keepdim=True), num_keep.to(valid.device)[:, None]
    ranks = valid.cumsum(dim=1) - 1
    stretch = (ranks * counts).div(num_tokens.clamp(min=1), rounding_mode="floor")
    begins = valid & (ranks * counts % num_tokens.clamp(min=1) < counts)
    indices = positions_of(begins)[:, : int(num_keep.max())]
    indices = indices.masked_fill(~first(num_keep, indices), -1)
    owners = indices.gather(1, stretch.clamp(0, indices.shape[1] - 1)).masked_fill(~valid, -1)
    return indices, averages(members(indices, owners))
