"""ToMe: merge the most similar tokens, round by round (arXiv 2210.09461, facebookresearch/ToMe)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from dualspeed.visual_tokens import (
    MergedTokens,
    VisualTokens,
    averages,
    by_score,
    first,
    members,
    merge,
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
    sums = tokens.features.float() * alive[..., None]
    sizes = alive.float()
    owners = torch.arange(alive.shape[1], device=alive.device).expand_as(alive)
    # Halving: as many rounds as it takes to come from N to the smallest budget.
    while (alive.sum(dim=1) > num_keep).any():
        target = merge_targets(alive, sums / sizes.clamp(min=1)[..., None], num_keep)
        stays = target == torch.arange(alive.shape[1], device=alive.device)
        # One sum over all tokens: those that stay are their own target.
        sums = torch.zeros_like(sums).scatter_add(1, target[..., None].expand_as(sums), sums)
        sizes = torch.zeros_like(sizes).scatter_add(1, target, sizes)
        owners = target.gather(1, owners)
        alive = alive & stays
    indices = positions_of(alive)[:, : int(num_keep.max())]
    indices = indices.masked_fill(~first(num_keep, indices), -1)
    return indices, averages(members(indices, owners.masked_fill(~tokens.valid(), -1)))


def merge_targets(alive: Tensor, means: Tensor, num_keep: Tensor) -> Tensor:
    """One round: (B, N) the token that each token goes to, most to themselves.

    Args:
        alive: (B, N) tokens that are left.
        means: (B, N, D) their vectors.
        num_keep: (B,) how many are to be left in the end.
    """
    num_alive = alive.sum(dim=1)
    num_merges = torch.minimum(num_alive - num_keep, num_alive // 2).clamp(min=0)
    order = positions_of(alive)[:, : int(num_alive.max())]
    is_left = first(num_alive, order)
    sources, targets = order[:, ::2], order[:, 1::2]

    unit = F.normalize(means, dim=-1)
    source_vectors, target_vectors = (
        unit.gather(1, tokens[..., None].expand(-1, -1, unit.shape[2])) for tokens in (sources, targets)
    )
    similarity = source_vectors @ target_vectors.transpose(1, 2)
    similarity = similarity.masked_fill(~is_left[:, None, 1::2], -torch.inf)
    nearest = similarity.argmax(dim=-1, keepdim=True)
    closeness = similarity.gather(2, nearest)[..., 0].masked_fill(~is_left[:, ::2], -torch.inf)

    ranked = by_score(closeness)
    merged = torch.zeros_like(is_left[:, ::2]).scatter(1, ranked, first(num_merges, ranked))
    partners = targets.gather(1, nearest[..., 0])
    everyone = torch.arange(alive.shape[1], device=alive.device).repeat(len(alive), 1)
    return everyone.scatter(1, sources, torch.where(merged, partners, sources))
