"""VisPruner: half of the tokens by attention, half by diversity (arXiv 2412.01818v2, Theia-4869/VisPruner)."""

import torch
from torch import Tensor

from dualspeed.pruners.contract import STRIP, VisualTokens, ascending, by_score, cosine_similarity, first

MOST_PER_ROUND = 8


@torch.no_grad()
def vispruner(tokens: VisualTokens, num_keep: Tensor) -> Tensor:
    """floor(k / 2) tokens that the CLS token attends to most; of the others what is left when duplicates are removed.

    The others stand in the order of their attention. In each round every second one is held against those between, by
    the cosine of the features before the projector, and the up to 8 most similar leave. The repository fails where an
    odd number remains; here the two halves may differ by one.
    """
    tokens.check("vispruner", *vispruner.needs)
    scores, candidates = tokens.attention(num_keep)
    num_keep = num_keep.to(scores.device)
    num_important = num_keep // 2
    # Candidates without a score, if there are any, come after those with one and ahead of all else.
    lowest = torch.finfo(scores.dtype).min
    ranked = by_score(torch.where(candidates, scores.clamp(min=lowest), -torch.inf))
    is_important = first(num_important, ranked)
    residual = remove_duplicates(
        cosine_similarity(tokens.pre_projection),
        order=ranked.gather(1, by_score((~is_important).float())),
        num_left=candidates.sum(dim=1) - num_important,
        num_wanted=num_keep - num_important,
    )
    # Important ones first, then the survivors; both fill their places from the left.
    picked = torch.cat([ranked, residual], dim=1)
    wanted = torch.cat([is_important, first(num_keep - num_important, residual)], dim=1)
    picked = picked.gather(1, by_score(wanted.float()))[:, : int(num_keep.max())]
    return ascending(picked, num_keep)


vispruner.needs = ("cls_attention", "pre_projection")


def remove_duplicates(similarity: Tensor, order: Tensor, num_left: Tensor, num_wanted: Tensor) -> Tensor:
    """Rounds of removal until `num_wanted` (B,) of the `num_left` (B,) tokens are left.

    Args:
        similarity: (B, N, N).
        order: (B, M) tokens, the `num_left` ones first.

    Returns:
        (B, M') tokens, the `num_wanted` ones first.
    """
    while (num_left > num_wanted).any():
        order = order[:, : int(num_left.max())]
        is_left = first(num_left, order)
        evens, odds = order[:, ::2], order[:, 1::2]
        closeness = nearest(similarity, evens, odds, is_left[:, 1::2]).masked_fill(~is_left[:, ::2], -torch.inf)

        num_evens = (num_left + 1) // 2
        num_removed = torch.minimum((num_left - num_wanted).clamp(0, MOST_PER_ROUND), num_evens)
        by_closeness = by_score(closeness)
        is_done = num_removed == 0
        survives = first(num_evens, by_closeness) & ~first(num_removed, by_closeness)
        reordered = torch.cat([evens.gather(1, by_closeness), odds], dim=1)
        reordered = reordered.gather(1, by_score(torch.cat([survives, is_left[:, 1::2]], dim=1).float()))
        order = torch.where(is_done[:, None], order, reordered)
        num_left = num_left - num_removed
    return order


def nearest(similarity: Tensor, rows: Tensor, columns: Tensor, counted: Tensor) -> Tensor:
    """(B, R) how near the tokens at `rows` (B, R) come to any at those `columns` (B, C) that are `counted` (B, C)."""
    # Whole rows with a penalty on all other columns, strip by strip: picked entries, or all rows at once, would be
    # large tensors in each of hundreds of rounds, and most of the time.
    penalty = torch.full_like(similarity[:, 0], -torch.inf)
    penalty = penalty.scatter(1, columns, torch.where(counted, 0.0, -torch.inf).to(penalty.dtype))[:, None]
    images = torch.arange(len(rows), device=rows.device)[:, None]
    strips = [similarity[images, strip].add_(penalty).amax(dim=-1) for strip in rows.split(STRIP, dim=1)]
    return torch.cat(strips, dim=1)
