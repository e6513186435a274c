"""PruMerge+: PruMerge with evenly spaced tokens added (arXiv 2403.15388, section 3.4; 42Shawn/LLaVA-PruMerge)."""

import torch
from torch import Tensor

from dualspeed.pruners.contract import MergedTokens, Pruner, VisualTokens
from dualspeed.pruners.merging import merge
from dualspeed.pruners.prumerge import merge_weights, num_without_sum
from dualspeed.pruners.selection import evenly_spaced, rank_by_attention, top_mask


def prumerge_plus(tokens: VisualTokens, num_keep: Tensor) -> MergedTokens:
    """Prune like PruMerge, but only half of the kept tokens are the most attended; the others are evenly spaced.

    Different from the repository: in training it adds as many evenly spaced tokens as attended ones, even if they are
    kept already; here they are spaced over the tokens that are not kept, so that none is kept twice.
    """
    with torch.no_grad():
        ranking, candidates = rank_by_attention(tokens, num_keep)
        num_spaced = num_without_sum(num_keep) // 2
        attended = top_mask(ranking, num_without_sum(num_keep) - num_spaced)
        kept = attended | evenly_spaced(candidates & ~attended, num_spaced)
        indices, weights = merge_weights(tokens, num_keep, candidates, kept)
    return merge(tokens.features, indices, weights)


PRUNER = Pruner(
    prumerge_plus,
    keeps="the tokens with the most CLS attention and evenly spaced ones, with their neighbours merged in",
    paper="2403.15388",
    needs=("cls_attention", "keys"),
    merges=True,
)
