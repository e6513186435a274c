"""DivPrune: keep the most diverse tokens (arXiv 2503.02175, repository vbdi/divprune)."""

import torch
from torch import Tensor

from dualspeed.pruners.contract import Pruner, VisualTokens
from dualspeed.pruners.selection import lowest_of_highest, sort_picks
from dualspeed.pruners.similarity import cosine_similarity


@torch.no_grad()
def divprune(tokens: VisualTokens, num_keep: Tensor) -> Tensor:
    """Greedy max-min diversity over cosine distances of the projected features.

    The first pick is the token whose nearest neighbour is farthest; each next pick is the token farthest from its
    nearest pick. Different from the repository: picked tokens are masked, so that identical tokens never repeat.
    """
    valid = tokens.valid()
    distances = cosine_distances(tokens.features, tokens.mask)
    nearest = distances_to_nearest(distances, valid)
    return sort_picks(farthest_first(distances, nearest, valid, int(num_keep.max())), num_keep)


def cosine_distances(features: Tensor, mask: Tensor | None) -> Tensor:
    """(B, N, N) 1 - cosine of the features (B, N, D), inf in the columns of padding and from each token to itself."""
    distances = cosine_similarity(features).neg_().add_(1)
    if mask is not None:
        # Padding is never a nearest neighbour.
        distances.masked_fill_(~mask[:, None, :], torch.inf)
    # No token is its own neighbour. A pick is masked, so its distance to itself has no other effect.
    distances.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    return distances


def distances_to_nearest(distances: Tensor, valid: Tensor) -> Tensor:
    """(B, N) distance of each token to its nearest neighbour, -inf for padding."""
    # The only valid token of an image has no neighbour, so its distance is inf: rank it ahead of padding.
    return distances.amin(dim=-1).masked_fill(~valid, -torch.inf)


def farthest_first(distances: Tensor, first_scores: Tensor, valid: Tensor, num_picks: int) -> Tensor:
    """Pick the token with the highest first score, then repeatedly the one farthest from its nearest pick.

    Args:
        distances: (B, N, N); row p holds the distances of all tokens to the pick p.
        first_scores: (B, N).
        valid: (B, N) tokens that can be picked.

    Returns:
        (B, num_picks) tokens in order of choice, invalid ones last.
    """
    to_nearest = first_scores
    picks = []
    taken = ~valid
    for step in range(num_picks):
        pick = lowest_of_highest(to_nearest.masked_fill(taken, -torch.inf))
        picks.append(pick)
        taken = taken.scatter(1, pick, True)
        to_pick = distances.gather(1, pick[:, :, None].expand(-1, -1, distances.shape[2]))[:, 0]
        to_nearest = to_pick if step == 0 else torch.minimum(to_nearest, to_pick)
    return torch.cat(picks, dim=1)


PRUNER = Pruner(divprune, keeps="the most diverse tokens", paper="2503.02175")
