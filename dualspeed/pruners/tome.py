"""ToMe: merge the most similar tokens, round by round (arXiv 2210.09461, facebookresearch/ToMe)."""

import torch
from torch import Tensor

from dualspeed.pruners.contract import (
    MergedTokens,
    VisualTokens,
    averages,
    by_score,
    first,
    inner_products,
    inverse_lengths,
    members,
    merge,
    pairs,
    positions_of,
)


def tome(tokens: VisualTokens, num_keep: Tensor) -> MergedTokens:
    """Bipartite soft matching of the projected features until k tokens are left, each the mean of what it took in.

    A round pairs every second token with the most similar of the others and merges the most similar pairs: half of the
    tokens at most. The repository merges between the layers of the vision tower and by attention keys, and leaves
    unmerged tokens ahead of merged ones; here it is one step after the projector, and tokens keep image order in every
    round.
    """
    indices, weights = clusters(tokens, num_keep)
    return merge(tokens.features, indices, weights)


tome.needs = ()


@torch.no_grad()
def clusters(tokens: VisualTokens, num_keep: Tensor) -> tuple[Tensor, Tensor]:
    """(B, K) tokens that take others in, and (B, K, N) weights of their means."""
    alive = tokens.valid()
    num_keep = num_keep.to(alive.device)
    everyone = torch.arange(alive.shape[1], device=alive.device).expand_as(alive)
    owners = everyone
    # Means have the cosines of sums, and inner products of sums are sums of inner products: no round takes up the
    # vectors themselves.
    products = inner_products(tokens.features)
    # Halving: as many rounds as it takes to come from N to the smallest budget.
    while (alive.sum(dim=1) > num_keep).any():
        target = merge_targets(alive, products, num_keep)
        products = add_rows(add_rows(products, target).transpose(1, 2).contiguous(), target)
        owners = target.gather(1, owners)
        alive = alive & (target == everyone)
    indices = positions_of(alive)[:, : int(num_keep.max())]
    indices = indices.masked_fill(~first(num_keep, indices), -1)
    return indices, averages(members(indices, owners.masked_fill(~tokens.valid(), -1)))


def add_rows(products: Tensor, target: Tensor) -> Tensor:
    """Add row n of each (B, N, N) matrix to its row `target` (B, N), in place; rows that are their own target stay."""
    batch_size, num_tokens = target.shape
    places = torch.arange(batch_size * num_tokens, device=target.device)
    flat_target = (target + places.view(batch_size, num_tokens)[:, :1]).flatten()
    moved = (flat_target != places).nonzero()[:, 0]
    rows = products.flatten(0, 1)
    rows.index_add_(0, flat_target[moved], rows[moved])
    return products


def merge_targets(alive: Tensor, products: Tensor, num_keep: Tensor) -> Tensor:
    """One round: (B, N) the token that each token goes to, most to themselves.

    Args:
        alive: (B, N) tokens that are left.
        products: (B, N, N) inner products of their vectors.
        num_keep: (B,) how many are to be left in the end.
    """
    num_alive = alive.sum(dim=1)
    num_merges = torch.minimum(num_alive - num_keep, num_alive // 2).clamp(min=0)
    order = positions_of(alive)[:, : int(num_alive.max())]
    is_left = first(num_alive, order)
    sources, targets = order[:, ::2], order[:, 1::2]

    scale = inverse_lengths(products)
    similarity = pairs(products, sources, targets)
    similarity *= scale.gather(1, sources)[:, :, None] * scale.gather(1, targets)[:, None]
    similarity = similarity.masked_fill(~is_left[:, None, 1::2], -torch.inf)
    nearest = similarity.argmax(dim=-1, keepdim=True)
    closeness = similarity.gather(2, nearest)[..., 0].masked_fill(~is_left[:, ::2], -torch.inf)

    ranked = by_score(closeness)
    merged = torch.zeros_like(is_left[:, ::2]).scatter(1, ranked, first(num_merges, ranked))
    partners = targets.gather(1, nearest[..., 0])
    everyone = torch.arange(alive.shape[1], device=alive.device).repeat(len(alive), 1)
    return everyone.scatter(1, sources, torch.where(merged, partners, sources))
