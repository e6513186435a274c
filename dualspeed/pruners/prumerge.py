"""PruMerge: keep the most attended tokens and merge the others into them (arXiv 2403.15388, 42Shawn/LLaVA-PruMerge)."""

import torch
from torch import Tensor

from dualspeed.pruners.contract import MergedTokens, Pruner, VisualTokens
from dualspeed.pruners.merging import merge, one_hot
from dualspeed.pruners.selection import mask_to_indices, rank_by_attention, rank_by_score, top_mask
from dualspeed.pruners.similarity import cosine_similarity

NUM_NEIGHBOURS = 32


def prumerge(tokens: VisualTokens, num_keep: Tensor) -> MergedTokens:
    """Keep the k - 1 most attended tokens, add to each its nearest tokens, and sum the pruned tokens into one more.

    A kept token adds its 32 nearest tokens, by the cosine of their keys, each times its attention; the last vector is
    the sum of the pruned tokens, weighted in the same way. Different from the repository: k is given, not the number of
    outliers of the attention; attention and keys are those of the layer that yields the features, mean over heads, not
    of the tower's last layer, which never runs; tokens are merged after the projector and in image order, where the sum
    of the pruned tokens takes the position of the most attended of them. With k = 1 there is no such sum, with k = N no
    merging.
    """
    with torch.no_grad():
        ranking, candidates = rank_by_attention(tokens, num_keep)
        kept = top_mask(ranking, num_without_sum(num_keep))
        indices, weights = merge_weights(tokens, num_keep, candidates, kept)
    return merge(tokens.features, indices, weights)


def num_without_sum(num_keep: Tensor) -> Tensor:
    """(B,) tokens kept beside the sum of the pruned ones: k - 1, but at least 1."""
    return (num_keep - 1).clamp(min=1)


def merge_weights(tokens: VisualTokens, num_keep: Tensor, candidates: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Choose the position of the sum of the pruned tokens and compute the weights of all k vectors.

    Args:
        candidates: (B, N) tokens that can be kept or merged.
        kept: (B, N) tokens that are kept, max(1, k - 1) in each image.

    Returns:
        (B, K) indices of the k vectors, and their weights (B, K, N).
    """
    attention = tokens.require("cls_attention").float()
    attention = attention.masked_fill(~candidates | attention.isinf(), 0)
    pruned = candidates & ~kept
    most_attended = rank_by_score(torch.where(pruned, attention, -1.0))
    at_sum = top_mask(most_attended, (num_keep > 1).long())

    indices = mask_to_indices(kept | at_sum, num_keep)
    is_sum = at_sum.gather(1, indices.clamp(min=0)) & (indices >= 0)
    own = one_hot(indices, kept.shape[1])
    neighbours = nearest_neighbours(tokens.require("keys").flatten(2), indices, candidates)
    attention = attention[:, None, :]
    weights = torch.where(is_sum[..., None], pruned[:, None, :] * attention, own + neighbours * attention)
    nothing_pruned = num_keep.to(kept.device, non_blocking=True) == tokens.valid().sum(dim=1)
    weights = torch.where(nothing_pruned[:, None, None], own, weights)
    return indices, weights * (indices >= 0)[..., None]


def nearest_neighbours(keys: Tensor, indices: Tensor, candidates: Tensor) -> Tensor:
    """(B, K, N) 1 at the nearest candidates of each token at `indices` (B, K), the token itself excluded."""
    num_tokens = keys.shape[1]
    rows = indices.clamp(min=0)[..., None].expand(-1, -1, num_tokens)
    similarity = cosine_similarity(keys).gather(1, rows)
    allowed = candidates[:, None, :] & (one_hot(indices, num_tokens) == 0)
    similarity = similarity.masked_fill(~allowed, -torch.inf)
    order = similarity.sort(dim=-1, descending=True, stable=True).indices[..., :NUM_NEIGHBOURS]
    return torch.zeros_like(similarity).scatter(2, order, 1.0) * allowed


PRUNER = Pruner(
    prumerge,
    keeps="the tokens with the most CLS attention, with their neighbours merged in",
    paper="2403.15388",
    needs=("cls_attention", "keys"),
    merges=True,
)
