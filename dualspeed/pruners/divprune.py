"""DivPrune: keep the most diverse tokens (arXiv 2503.02175, repository vbdi/divprune)."""

import torch
from torch import Tensor

from dualspeed.pruners.contract import VisualTokens, ascending, cosine_similarity


@torch.no_grad()
def divprune(tokens: VisualTokens, num_keep: Tensor) -> Tensor:
    """Greedy max-min diversity over cosine distances of the projected features.

    The first pick is the token whose nearest neighbour is farthest; each next one is the token farthest from its
    nearest pick. Unlike the repository's code, picked tokens are masked, so that identical tokens never repeat.
    """
    valid = tokens.valid()
    distances = cosine_similarity(tokens.features).neg_().add_(1)
    if tokens.mask is not None:
        # Padding is nobody's nearest neighbour.
        distances.masked_fill_(~valid[:, None, :], torch.inf)
    picked = greedy_max_min(distances, valid, int(num_keep.max()))
    return ascending(picked, num_keep)


divprune.needs = ()


def greedy_max_min(distances: Tensor, valid: Tensor, num_picks: int) -> Tensor:
    """(B, N, N) distances, changed in place -> (B, num_picks) tokens in order of choice; invalid ones come last."""
    # No token is its own neighbour; as a pick it is masked, so that its distance to itself counts nowhere else.
    distances.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    to_nearest = distances.amin(dim=-1)
    # A single valid token has no neighbour: keep it ahead of padding all the same.
    to_nearest = to_nearest.masked_fill(~valid, -torch.inf)

    picks = []
    taken = ~valid
    for step in range(num_picks):
        pick = to_nearest.masked_fill(taken, -torch.inf).argmax(dim=-1, keepdim=True)
        picks.append(pick)
        taken = taken.scatter(1, pick, True)
        to_pick = distances.gather(1, pick[:, :, None].expand(-1, -1, distances.shape[2]))[:, 0]
        to_nearest = to_pick if step == 0 else torch.minimum(to_nearest, to_pick)
    return torch.cat(picks, dim=1)
