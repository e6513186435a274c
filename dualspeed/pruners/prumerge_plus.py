"""PruMerge+: PruMerge with evenly spaced tokens added (arXiv 2403.15388, section 3.4; 42Shawn/LLaVA-PruMerge)."""

import torch
from torch import Tensor

from dualspeed.pruners.contract import MergedTokens, VisualTokens, by_score, evenly_spaced, first, mark, merge
from dualspeed.pruners.prumerge import num_own, take_in_neighbours


def prumerge_plus(tokens: VisualTokens, num_keep: Tensor) -> MergedTokens:
    """As PruMerge, but only half of the kept tokens are the most attended; the others are evenly spaced.

    The repository adds as many evenly spaced tokens as attended ones when it trains, whether they are kept already or
    not; here they are spaced over those that are not, so that none comes twice.
    """
    tokens.check("prumerge_plus", *prumerge_plus.needs)
    with torch.no_grad():
        scores, candidates = tokens.attention(num_keep)
        num_spaced = num_own(num_keep) // 2
        ranked = by_score(scores.masked_fill(~candidates, -torch.inf))
        attended = mark(candidates, ranked, first(num_own(num_keep) - num_spaced, ranked))
        kept = attended | evenly_spaced(candidates & ~attended, num_spaced)
        indices, weights = take_in_neighbours(tokens, num_keep, candidates, kept)
    return merge(tokens.features, indices, weights)


prumerge_plus.needs = ("cls_attention", "keys")
