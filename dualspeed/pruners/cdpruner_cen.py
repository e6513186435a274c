"""CDPruner + Cen: keep diverse, relevant tokens that are unlike the rest, by centred similarity (arXiv 2608.30263)."""

import torch
from torch import Tensor

from dualspeed.pruners.cdpruner import greedy_map, min_max_scaled
from dualspeed.pruners.centring import centred_similarity, distinctiveness
from dualspeed.pruners.contract import Pruner, VisualTokens
from dualspeed.pruners.selection import sort_picks


@torch.no_grad()
def cdpruner_cen(tokens: VisualTokens, num_keep: Tensor) -> Tensor:
    """CDPruner with centred cosines as similarity, and relevance times distinctiveness as a token's weight.

    Different from the paper: as in our `cdpruner`, relevance is scaled within each image, and picked tokens are masked;
    the scaled distinctiveness has CDPruner's offset of 1e-6; a family whose tower has no merger of its own is compared
    by its projected features.
    """
    valid = tokens.valid()
    weight = min_max_scaled(tokens.require("relevance").float(), valid) * distinctiveness(tokens)
    kernel = centred_similarity(tokens).mul_(weight[:, :, None]).mul_(weight[:, None])
    return sort_picks(greedy_map(kernel, valid, int(num_keep.max())), num_keep)


PRUNER = Pruner(
    cdpruner_cen,
    keeps="the most diverse of the tokens that are relevant to the question, by similarity without what all share",
    paper="2608.30263",
    needs=("relevance",),
    optional=("before_merger",),
)
