"""DivPrune + Cen: keep tokens that are diverse and unlike the rest, by centred similarity (arXiv 2608.30263)."""

import torch
from torch import Tensor

from dualspeed.pruners.centring import centred_similarity, compared_features, distinctiveness
from dualspeed.pruners.contract import Pruner, VisualTokens
from dualspeed.pruners.divprune import cosine_distances, distances_to_nearest, farthest_first
from dualspeed.pruners.selection import sort_picks


@torch.no_grad()
def divprune_cen(tokens: VisualTokens, num_keep: Tensor) -> Tensor:
    """Greedy max-min diversity over centred cosine distances, each token's times its distinctiveness.

    The first pick is DivPrune's. Different from the paper: picked tokens are masked, so that none repeats; the scaled
    distinctiveness has CDPruner's offset of 1e-6, so that the least distinct token still has a distance; a family whose
    tower has no merger of its own is compared by its projected features.
    """
    valid = tokens.valid()
    nearest = distances_to_nearest(cosine_distances(compared_features(tokens), tokens.mask), valid)
    distances = centred_similarity(tokens).neg_().add_(1).mul_(distinctiveness(tokens)[:, None])
    return sort_picks(farthest_first(distances, nearest, valid, int(num_keep.max())), num_keep)


PRUNER = Pruner(
    divprune_cen,
    keeps="the most diverse tokens, by similarity without what all tokens share",
    paper="2608.30263",
    optional=("before_merger",),
)
