"""OTPrune: keep tokens whose distribution is nearest to that of all (arXiv 2602.20205, xiwenc1/OTPrune)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from dualspeed.pruners.cdpruner import greedy_map
from dualspeed.pruners.contract import Pruner, VisualTokens
from dualspeed.pruners.selection import sort_picks
from dualspeed.pruners.similarity import inner_products

SCALE = 0.01
"""Weight of the features' kernel beside the identity, as in the repository."""


@torch.no_grad()
def otprune(tokens: VisualTokens, num_keep: Tensor) -> Tensor:
    """Greedily maximise the log-determinant of I + 0.01 G G^T, the paper's bound on the optimal transport distance.

    G holds the inner products of the projected features, after each dimension has been divided by its norm over the
    image's tokens. Different from the repository: everything is computed in float32, whatever the features' type; a
    dimension that is 0 in all tokens stays 0; picked tokens are masked.
    """
    valid = tokens.valid()
    columns = F.normalize(tokens.features.float().masked_fill(~valid[..., None], 0.0), dim=1)
    kernel = inner_products(inner_products(columns)).mul_(SCALE)
    kernel.diagonal(dim1=1, dim2=2).add_(1)
    return sort_picks(greedy_map(kernel, valid, int(num_keep.max()), rounding=0.0), num_keep)


PRUNER = Pruner(
    otprune,
    keeps="the tokens whose distribution is nearest to that of all, by optimal transport",
    paper="2602.20205",
)
