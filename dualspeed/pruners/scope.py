"""SCOPE: keep tokens that cover the image, weighted by attention (arXiv 2510.24214, kinredon/SCOPE)."""

import torch
from torch import Tensor

from dualspeed.pruners.contract import Pruner, VisualTokens
from dualspeed.pruners.coverage import greedy_cover
from dualspeed.pruners.selection import sort_picks
from dualspeed.pruners.similarity import cosine_similarity


@torch.no_grad()
def scope(tokens: VisualTokens, num_keep: Tensor) -> Tensor:
    """Greedily add the token with the largest gain in coverage times CLS attention.

    A token covers another as well as their features before the projector are similar, by cosine. The exponent of the
    attention is 1, as in the repository. Different from it: attention is the mean over heads, not the sum, which
    orders tokens alike; tokens are dropped after the projector; tokens without attention (newlines) are kept last; in
    images of 1,024 or more tokens, gains are computed anew only where they can decide.
    """
    valid = tokens.valid()
    attention = tokens.require("cls_attention").float()
    attention = torch.where(attention == -torch.inf, -1.0, attention)
    similarity = cosine_similarity(tokens.require("pre_projection"))
    if tokens.mask is not None:
        # Padding is nothing to be covered.
        similarity.masked_fill_(~valid[:, None], 0.0)
    return sort_picks(greedy_cover(similarity, attention, valid, int(num_keep.max())), num_keep)


PRUNER = Pruner(
    scope,
    keeps="the tokens that cover the others best, weighted by attention",
    paper="2510.24214",
    needs=("cls_attention", "pre_projection"),
)
