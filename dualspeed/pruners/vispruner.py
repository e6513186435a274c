"""VisPruner: half of the tokens by attention, half by diversity (arXiv 2412.01818v2, Theia-4869/VisPruner)."""

import torch
from torch import Tensor

from dualspeed.pruners.contract import Pruner, VisualTokens
from dualspeed.pruners.selection import prefix_mask, rank_by_attention, rank_by_score, sort_picks, true_positions_first
from dualspeed.pruners.similarity import STRIP_ROWS, cosine_similarity

MAX_REMOVED_PER_ROUND = 8


@torch.no_grad()
def vispruner(tokens: VisualTokens, num_keep: Tensor) -> Tensor:
    """Keep the floor(k / 2) tokens with the most CLS attention, and those of the others that survive deduplication.

    The others are ordered by attention. Each round compares every second token with the tokens between, by the cosine
    of the features before the projector, and removes the up to 8 most similar ones. Different from the repository,
    which fails if an odd number of tokens remains: here the two halves may differ by one.
    """
    ranking, candidates = rank_by_attention(tokens, num_keep)
    on_host, num_keep = num_keep.cpu(), num_keep.to(ranking.device, non_blocking=True)
    num_important = num_keep // 2
    is_important = prefix_mask(num_important, ranking)
    survivors = remove_duplicates(
        cosine_similarity(tokens.require("pre_projection")),
        order=ranking.gather(1, true_positions_first(~is_important)),
        num_left=candidates.sum(dim=1) - num_important,
        num_wanted=num_keep - num_important,
        # Tokens without attention (newlines) are counted too: the host doesn't know their number.
        at_most=(tokens.counts() - on_host // 2).tolist(),
        wanted=(on_host - on_host // 2).tolist(),
    )
    # Each row: important tokens first, then survivors, without gaps.
    tokens_of_both = torch.cat([ranking, survivors], dim=1)
    is_kept = torch.cat([is_important, prefix_mask(num_keep - num_important, survivors)], dim=1)
    picks = tokens_of_both.gather(1, true_positions_first(is_kept))[:, : int(on_host.max())]
    return sort_picks(picks, num_keep)


def remove_duplicates(
    similarity: Tensor, order: Tensor, num_left: Tensor, num_wanted: Tensor, at_most: list[int], wanted: list[int]
) -> Tensor:
    """Remove the most similar tokens in rounds until `num_wanted` (B,) of the `num_left` (B,) tokens are left.

    Args:
        similarity: (B, N, N).
        order: (B, M) tokens, the `num_left` ones first.
        at_most: upper bounds of `num_left` on the host, from which the number of rounds follows; a round changes
            nothing in an image that has no more tokens than wanted.
        wanted: `num_wanted` on the host.

    Returns:
        (B, M') tokens, the `num_wanted` ones first.
    """
    while any(left > goal for left, goal in zip(at_most, wanted, strict=True)):
        order = order[:, : max(at_most)]
        is_left = prefix_mask(num_left, order)
        evens, odds = order[:, ::2], order[:, 1::2]
        highest = highest_similarity(similarity, evens, odds, is_left[:, 1::2])
        highest = highest.masked_fill(~is_left[:, ::2], -torch.inf)

        num_evens = (num_left + 1) // 2
        num_removed = torch.minimum((num_left - num_wanted).clamp(0, MAX_REMOVED_PER_ROUND), num_evens)
        most_similar_first = rank_by_score(highest)
        is_done = num_removed == 0
        survives = prefix_mask(num_evens, evens) & ~prefix_mask(num_removed, evens)
        reordered = torch.cat([evens.gather(1, most_similar_first), odds], dim=1)
        is_next = torch.cat([survives, is_left[:, 1::2]], dim=1)
        reordered = reordered.gather(1, true_positions_first(is_next))
        order = torch.where(is_done[:, None], order, reordered)
        num_left = num_left - num_removed
        at_most = [
            left - min(max(left - goal, 0), MAX_REMOVED_PER_ROUND, (left + 1) // 2)
            for left, goal in zip(at_most, wanted, strict=True)
        ]
    return order


def highest_similarity(similarity: Tensor, rows: Tensor, columns: Tensor, counted: Tensor) -> Tensor:
    """(B, R) highest similarity of each token at `rows` (B, R) to the `counted` (B, C) tokens at `columns` (B, C)."""
    # Whole rows with a penalty on all other columns, strip by strip: gathering entries, or all rows at once, would
    # allocate large tensors in each of hundreds of rounds, and take most of the time.
    penalty = torch.full_like(similarity[:, 0], -torch.inf)
    penalty = penalty.scatter(1, columns, torch.where(counted, 0.0, -torch.inf).to(penalty.dtype))[:, None]
    images = torch.arange(len(rows), device=rows.device)[:, None]
    strips = [similarity[images, strip].add_(penalty).amax(dim=-1) for strip in rows.split(STRIP_ROWS, dim=1)]
    return torch.cat(strips, dim=1)


PRUNER = Pruner(
    vispruner,
    keeps="half by attention, half by diversity",
    paper="2412.01818",
    needs=("cls_attention", "pre_projection"),
)
