"""VisionZip: dominant tokens as they are, the rest merged into contextual ones (arXiv 2412.04467, dvlab-research)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from dualspeed.pruners.contract import (
    MergedTokens,
    VisualTokens,
    averages,
    by_score,
    first,
    mark,
    members,
    merge,
    one_hot,
    positions_of,
)

CONTEXTUAL_SHARE = 10, 64
"""The published budget of 64 tokens has 10 contextual ones; other budgets the same share, below 7 none."""


def visionzip(tokens: VisualTokens, num_keep: Tensor) -> MergedTokens:
    """Keep what the CLS token attends to most; add the mean of the rest's nearest tokens to evenly strided targets.

    Nearness is the cosine of the tower's keys, mean over heads. Different from the repository: tokens are merged after
    the projector, so that any model's projector serves; they keep image order; the CLS token itself, which has no
    place in the sequence, counts as one more dominant token.
    """
    tokens.check("visionzip", *visionzip.needs)
    indices, weights = dominant_and_contextual(tokens, num_keep)
    return merge(tokens.features, indices, weights)


visionzip.needs = ("cls_attention", "keys")


@torch.no_grad()
def dominant_and_contextual(tokens: VisualTokens, num_keep: Tensor) -> tuple[Tensor, Tensor]:
    """(B, K) kept tokens and (B, K, N) weights of their vectors."""
    scores, candidates = tokens.attention(num_keep)
    num_keep = num_keep.to(scores.device)
    num_contextual = num_keep * CONTEXTUAL_SHARE[0] // CONTEXTUAL_SHARE[1]

    ranked = by_score(scores.masked_fill(~candidates, -torch.inf))
    dominant = mark(candidates, ranked, first(num_keep - num_contextual, ranked))
    rest = candidates & ~dominant
    step = (rest.sum(dim=1) // num_contextual.clamp(min=1)).clamp(min=1)[:, None]
    rank = rest.cumsum(dim=1) - 1
    contextual = rest & (rank % step == 0) & (rank < step * num_contextual[:, None])

    indices = positions_of(dominant | contextual)[:, : int(num_keep.max())]
    indices = indices.masked_fill(~first(num_keep, indices), -1)
    unit = F.normalize(tokens.keys.float().mean(dim=2), dim=-1)
    nearness = (unit @ unit.transpose(1, 2)).masked_fill(~contextual[:, None, :], -torch.inf)
    joins = rest & ~contextual & contextual.any(dim=1, keepdim=True)
    owners = nearness.argmax(dim=-1).masked_fill(~joins, -1)
    return indices, one_hot(indices, rest.shape[1]) + averages(members(indices, owners))
