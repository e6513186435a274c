"""ToMe: merge the most similar tokens, round by round (arXiv 2210.09461, facebookresearch/ToMe)."""

import torch
from torch import Tensor

from dualspeed.pruners.contract import MergedTokens, Pruner, VisualTokens
from dualspeed.pruners.merging import mean_weights, merge
from dualspeed.pruners.selection import (
    mask_to_indices,
    prefix_mask,
    rank_by_score,
    top_mask,
    true_places,
    true_positions_first,
)
from dualspeed.pruners.similarity import inner_products, inverse_norms, submatrix


def tome(tokens: VisualTokens, num_keep: Tensor) -> MergedTokens:
    """Bipartite soft matching of the projected features until k tokens are left, each the mean of its cluster.

    A round matches every second token to the most similar of the others and merges the most similar pairs, at most half
    of the tokens. Different from the repository: it merges between the layers of the vision tower and by attention
    keys, and puts unmerged tokens ahead of merged ones; here merging is one step after the projector, and tokens keep
    image order in every round.
    """
    indices, weights = cluster_means(tokens, num_keep)
    return merge(tokens.features, indices, weights)


@torch.no_grad()
def cluster_means(tokens: VisualTokens, num_keep: Tensor) -> tuple[Tensor, Tensor]:
    """(B, K) token that each cluster was merged into, and (B, K, N) weights of the clusters' means."""
    is_left = tokens.valid()
    itself = torch.arange(is_left.shape[1], device=is_left.device).expand_as(is_left)
    owners = itself
    # Means have the cosines of sums, and inner products of sums are sums of inner products: the rounds need the
    # products alone, not the vectors.
    products = inner_products(tokens.features)
    # The host counts along instead of asking the device. A round halves the tokens at most: the number of rounds is
    # log2(N / k) for the smallest budget.
    num_left, num_keep = tokens.counts(), num_keep.cpu()
    while (num_merges := torch.minimum(num_left - num_keep, num_left // 2).clamp(min=0)).any():
        target = merge_targets(is_left, products, num_left, num_merges)
        moved = true_places(target != itself, int(num_merges.sum()))
        products = add_rows(add_rows(products, target, moved).transpose(1, 2).contiguous(), target, moved)
        owners = target.gather(1, owners)
        is_left = is_left & (target == itself)
        num_left = num_left - num_merges
    indices = mask_to_indices(is_left, num_keep)
    return indices, mean_weights(indices, owners.masked_fill(~tokens.valid(), -1))


def add_rows(products: Tensor, target: Tensor, moved: Tensor) -> Tensor:
    """Add row n of each (B, N, N) matrix to row `target[n]` (B, N), in place.

    Args:
        moved: (M,) places in the flattened `target` of the rows that are added; all others have target[n] = n.
    """
    batch_size, num_tokens = target.shape
    first_rows = torch.arange(batch_size, device=target.device)[:, None] * num_tokens
    flat_target = (target + first_rows).flatten()
    rows = products.flatten(0, 1)
    rows.index_add_(0, flat_target[moved], rows[moved])
    return products


def merge_targets(is_left: Tensor, products: Tensor, num_left: Tensor, num_merges: Tensor) -> Tensor:
    """One round of matching.

    Args:
        is_left: (B, N) tokens that are not merged into another one yet.
        products: (B, N, N) inner products of their vectors.
        num_left: (B,) number of tokens in `is_left`, on the CPU.
        num_merges: (B,) tokens to merge in this round, on the CPU.

    Returns:
        (B, N) index of the token that each token is merged into; its own index if it isn't merged in this round.
    """
    order = true_positions_first(is_left)[:, : int(num_left.max())]
    counted = prefix_mask(num_left, order)
    sources, targets = order[:, ::2], order[:, 1::2]

    scale = inverse_norms(products)
    similarity = submatrix(products, sources, targets)
    similarity *= scale.gather(1, sources)[:, :, None] * scale.gather(1, targets)[:, None]
    similarity = similarity.masked_fill(~counted[:, None, 1::2], -torch.inf)
    nearest = similarity.argmax(dim=-1, keepdim=True)
    highest = similarity.gather(2, nearest)[..., 0].masked_fill(~counted[:, ::2], -torch.inf)

    merged = top_mask(rank_by_score(highest), num_merges)
    partners = targets.gather(1, nearest[..., 0])
    itself = torch.arange(is_left.shape[1], device=is_left.device).repeat(len(is_left), 1)
    return itself.scatter(1, sources, torch.where(merged, partners, sources))


PRUNER = Pruner(tome, keeps="means of similar tokens, paired round by round", paper="2210.09461", merges=True)
