"""Average pooling (LLaVolta, arXiv 2406.20092, Beckschen/LLaVolta)."""

import torch
from torch import Tensor

from dualspeed.pruners.contract import MergedTokens, Pruner, VisualTokens
from dualspeed.pruners.merging import mean_weights, merge
from dualspeed.pruners.selection import mask_to_indices


def spatial_pool(tokens: VisualTokens, num_keep: Tensor) -> MergedTokens:
    """Average k segments of the image in raster order, with lengths as equal as possible.

    Different from the repository: LLaVolta pools with a kernel of a whole number of tokens (`AvgPool1d`); segments
    whose lengths differ by one allow any k. Each mean takes the position of its segment's first token.
    """
    indices, weights = segment_means(tokens, num_keep)
    return merge(tokens.features, indices, weights)


@torch.no_grad()
def segment_means(tokens: VisualTokens, num_keep: Tensor) -> tuple[Tensor, Tensor]:
    """(B, K) index of each segment's first token, and (B, K, N) weights of its mean."""
    valid = tokens.valid()
    num_tokens, counts = valid.sum(dim=1, keepdim=True), num_keep.to(valid.device, non_blocking=True)[:, None]
    ranks = valid.cumsum(dim=1) - 1
    segment = (ranks * counts).div(num_tokens.clamp(min=1), rounding_mode="floor")
    is_first = valid & (ranks * counts % num_tokens.clamp(min=1) < counts)
    indices = mask_to_indices(is_first, num_keep)
    owners = indices.gather(1, segment.clamp(0, indices.shape[1] - 1)).masked_fill(~valid, -1)
    return indices, mean_weights(indices, owners)


PRUNER = Pruner(spatial_pool, keeps="means of equal sections of the image", paper="2406.20092", merges=True)
