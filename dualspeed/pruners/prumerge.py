"""PruMerge: keep what CLS attends to and let it take in its neighbours (arXiv 2403.15388, 42Shawn/LLaVA-PruMerge)."""

import torch
from torch import Tensor

from dualspeed.pruners.contract import (
    MergedTokens,
    VisualTokens,
    by_score,
    cosine_similarity,
    first,
    mark,
    merge,
    one_hot,
    positions_of,
)

NUM_NEIGHBOURS = 32


def prumerge(tokens: VisualTokens, num_keep: Tensor) -> MergedTokens:
    """The k - 1 most attended tokens, each with its nearest tokens added, and one token for all the others.

    A kept token adds its 32 nearest tokens, by the cosine of their keys, each times its attention; the last vector is
    the sum of what was not kept, likewise weighted. Different from the repository: k is given, not the number of
    outliers of the attention; attention and keys are those of the layer that yields the features, mean over heads, not
    of the tower's last, which never runs; tokens are merged after the projector and in image order, where the sum of
    the rest stands in the place of its most attended token. With k = 1 there is no such sum, with k = N no merging.
    """
    tokens.check("prumerge", *prumerge.needs)
    with torch.no_grad():
        scores, candidates = tokens.attention(num_keep)
        ranked = by_score(scores.masked_fill(~candidates, -torch.inf))
        kept = mark(candidates, ranked, first(num_own(num_keep), ranked))
        indices, weights = take_in_neighbours(tokens, num_keep, candidates, kept)
    return merge(tokens.features, indices, weights)


prumerge.needs = ("cls_attention", "keys")


def num_own(num_keep: Tensor) -> Tensor:
    """(B,) tokens that stand for themselves: all but the one that stands for the rest."""
    return (num_keep - 1).clamp(min=1)


def take_in_neighbours(
    tokens: VisualTokens, num_keep: Tensor, candidates: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor]:
    """Place the sum of the rest and weigh what each vector is made of.

    Args:
        candidates: (B, N) tokens with a part in it.
        kept: (B, N) those that stand for themselves, max(1, k - 1) in each image.

    Returns:
        (B, K) indices of all k vectors, and their weights (B, K, N).
    """
    num_keep = num_keep.to(kept.device)
    attention = tokens.cls_attention.float().masked_fill(~candidates | tokens.cls_attention.isinf(), 0)
    rest = candidates & ~kept
    most_attended = by_score(torch.where(rest, attention, -1.0))
    for_rest = mark(rest, most_attended, first((num_keep > 1).long(), most_attended))

    indices = positions_of(kept | for_rest)[:, : int(num_keep.max())]
    indices = indices.masked_fill(~first(num_keep, indices), -1)
    is_sum = for_rest.gather(1, indices.clamp(min=0)) & (indices >= 0)
    own = one_hot(indices, kept.shape[1])
    neighbours = nearest(tokens.keys.flatten(2), indices, candidates)
    attention = attention[:, None, :]
    weights = torch.where(is_sum[..., None], rest[:, None, :] * attention, own + neighbours * attention)
    nothing_pruned = num_keep == tokens.valid().sum(dim=1)
    weights = torch.where(nothing_pruned[:, None, None], own, weights)
    return indices, weights * (indices >= 0)[..., None]


def nearest(keys: Tensor, indices: Tensor, candidates: Tensor) -> Tensor:
    """(B, K, N) 1 at the nearest candidates of each token at `indices` (B, K), itself left out."""
    num_tokens = keys.shape[1]
    rows = indices.clamp(min=0)[..., None].expand(-1, -1, num_tokens)
    similarity = cosine_similarity(keys).gather(1, rows)
    allowed = candidates[:, None, :] & (one_hot(indices, num_tokens) == 0)
    similarity = similarity.masked_fill(~allowed, -torch.inf)
    order = similarity.sort(dim=-1, descending=True, stable=True).indices[..., :NUM_NEIGHBOURS]
    return torch.zeros_like(similarity).scatter(2, order, 1.0) * allowed
