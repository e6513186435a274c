"""VisionZip: dominant tokens as they are, the others merged into contextual ones (arXiv 2412.04467, dvlab-research)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from dualspeed.pruners.contract import MergedTokens, Pruner, VisualTokens
from dualspeed.pruners.merging import mean_weights, merge, one_hot
from dualspeed.pruners.selection import mask_to_indices, rank_by_attention, top_mask

CONTEXTUAL_SHARE = 10, 64
"""The published budget of 64 tokens has 10 contextual ones; other budgets have the same share, below 7 none."""


def visionzip(tokens: VisualTokens, num_keep: Tensor) -> MergedTokens:
    """Keep the tokens with the most CLS attention, and merge the others into evenly strided contextual tokens.

    Each contextual token adds the mean of the tokens that are nearer to it than to any other, by the cosine of the
    tower's keys, mean over heads. Different from the repository: tokens are merged after the projector, so that any
    model's projector serves; they keep image order; the CLS token itself, which has no place in the sequence, counts as
    one more dominant token.
    """
    indices, weights = dominant_and_contextual(tokens, num_keep)
    return merge(tokens.features, indices, weights)


@torch.no_grad()
def dominant_and_contextual(tokens: VisualTokens, num_keep: Tensor) -> tuple[Tensor, Tensor]:
    """(B, K) kept tokens, and (B, K, N) weights of their vectors."""
    ranking, candidates = rank_by_attention(tokens, num_keep)
    num_contextual = num_keep * CONTEXTUAL_SHARE[0] // CONTEXTUAL_SHARE[1]
    dominant = top_mask(ranking, num_keep - num_contextual)
    num_contextual = num_contextual.to(candidates.device, non_blocking=True)
    others = candidates & ~dominant
    stride = (others.sum(dim=1) // num_contextual.clamp(min=1)).clamp(min=1)[:, None]
    rank = others.cumsum(dim=1) - 1
    contextual = others & (rank % stride == 0) & (rank < stride * num_contextual[:, None])

    indices = mask_to_indices(dominant | contextual, num_keep)
    unit = F.normalize(tokens.require("keys").float().mean(dim=2), dim=-1)
    similarity = (unit @ unit.transpose(1, 2)).masked_fill(~contextual[:, None, :], -torch.inf)
    is_merged = others & ~contextual & contextual.any(dim=1, keepdim=True)
    owners = similarity.argmax(dim=-1).masked_fill(~is_merged, -1)
    return indices, one_hot(indices, others.shape[1]) + mean_weights(indices, owners)


PRUNER = Pruner(
    visionzip,
    keeps="the tokens with the most CLS attention; the rest is merged into a few tokens",
    paper="2412.04467",
    needs=("cls_attention", "keys"),
    merges=True,
)
