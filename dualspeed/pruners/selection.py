"""Ranking of tokens, and conversion between masks and indices.

B images, N visual tokens per image, K tokens kept (the largest budget in the batch). A ranking (B, N) holds all N token
indices of each image, best first. Indices (B, K) are ascending, with -1 beyond an image's budget.
"""

import torch
from torch import Tensor

from dualspeed.pruners.contract import VisualTokens

ROUNDING = 1e-6
"""Share of two numbers' size below which their difference is rounding."""


def rank_by_score(scores: Tensor) -> Tensor:
    """(B, N) scores -> ranking (B, N) from the highest score to the lowest, ties by the lower index."""
    return scores.sort(dim=-1, descending=True, stable=True).indices


def rank_by_attention(tokens: VisualTokens, num_keep: Tensor) -> tuple[Tensor, Tensor]:
    """Rank tokens by CLS attention.

    Returns:
        The ranking (B, N), and the candidates (B, N) bool: tokens that have attention, or all valid tokens of an image
        that has fewer of those than it keeps. Candidates come first; those without attention are the last of them.
    """
    scores = tokens.require("cls_attention").float().masked_fill(~tokens.valid(), -torch.inf)
    has_attention = scores > -torch.inf
    enough = has_attention.sum(dim=1) >= num_keep.to(scores.device, non_blocking=True)
    candidates = torch.where(enough[:, None], has_attention, tokens.valid())
    lowest = torch.finfo(scores.dtype).min
    return rank_by_score(torch.where(candidates, scores.clamp(min=lowest), -torch.inf)), candidates


def lowest_of_highest(scores: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """(B, N) scores -> (B, 1) index of the highest; of those that are as high but for rounding, the lowest index.

    Equal tokens, as the ends of rows in LLaVA-NeXT are, have equal scores, which may round in another way in each batch
    and on each machine.

    Args:
        scale: size of the numbers whose differences the scores are, or (B, N), that of each.
    """
    highest = scores.amax(dim=-1, keepdim=True)
    return (scores >= highest - ROUNDING * scale).to(torch.uint8).argmax(dim=-1, keepdim=True)


def select_top_k(scores: Tensor, num_keep: Tensor) -> Tensor:
    """Indices of the `num_keep` highest scores of each row, ascending, ties by the lower index.

    Args:
        scores: (B, N); -inf marks tokens that can't be selected.
        num_keep: (B,) integers.

    Returns:
        (B, num_keep.max()) indices, shorter rows padded with -1 at the end.
    """
    return sort_picks(rank_by_score(scores)[:, : int(num_keep.max())], num_keep)


def sort_picks(picks: Tensor, num_keep: Tensor) -> Tensor:
    """Sort the first `num_keep` (B,) entries of `picks` (B, K) into image order and replace the others by -1."""
    beyond = torch.iinfo(picks.dtype).max
    ordered = picks.masked_fill(~prefix_mask(num_keep, picks), beyond).sort(dim=-1).values
    return ordered.masked_fill(ordered == beyond, -1)


def prefix_mask(counts: Tensor, like: Tensor) -> Tensor:
    """(B, M) bool with the shape and device of `like`, True in the first `counts` (B,) columns of each row."""
    return torch.arange(like.shape[1], device=like.device) < counts.to(like.device, non_blocking=True)[:, None]


def top_mask(ranking: Tensor, counts: Tensor) -> Tensor:
    """(B, N) bool, True for the `counts` (B,) best tokens of a ranking (B, N)."""
    return torch.zeros_like(ranking, dtype=torch.bool).scatter(1, ranking, prefix_mask(counts, ranking))


def true_positions_first(mask: Tensor) -> Tensor:
    """(..., N) bool -> (..., N) the positions of True, ascending, followed by the positions of False, ascending."""
    return (~mask).to(torch.uint8).sort(dim=-1, stable=True).indices


def true_places(mask: Tensor, count: int) -> Tensor:
    """(count,) places of True in the flattened mask, ascending: `nonzero` without its host-device sync.

    Args:
        count: number of True, which the host has to know.
    """
    return true_positions_first(mask.flatten())[:count]


def mask_to_indices(mask: Tensor, num_keep: Tensor) -> Tensor:
    """(B, N) bool with `num_keep` (B,) True in each row -> their indices (B, K)."""
    positions = true_positions_first(mask)[:, : int(num_keep.max())]
    return positions.masked_fill(~prefix_mask(num_keep, positions), -1)


def evenly_spaced(candidates: Tensor, counts: Tensor) -> Tensor:
    """(B, N) bool, True at the centres of `counts` (B,) equal segments of each image's `candidates` (B, N)."""
    num_candidates, counts = (
        candidates.sum(dim=1, keepdim=True),
        counts.to(candidates.device, non_blocking=True)[:, None],
    )
    segment = torch.arange(candidates.shape[1], device=candidates.device)[None]
    centres = ((2 * segment + 1) * num_candidates).div(2 * counts.clamp(min=1), rounding_mode="floor")
    centres, wanted = centres.clamp(max=candidates.shape[1] - 1), (segment < counts).expand_as(candidates)
    is_centre = torch.zeros_like(centres).scatter_add(1, centres, wanted.long()) > 0
    return torch.zeros_like(candidates).scatter(1, true_positions_first(candidates), is_centre)
