"""CDPruner: keep diverse tokens that are relevant to the question (arXiv 2506.10967, Theia-4869/CDPruner)."""

import torch
from torch import Tensor

from dualspeed.pruners.contract import Pruner, VisualTokens
from dualspeed.pruners.selection import lowest_of_highest, sort_picks
from dualspeed.pruners.similarity import cosine_similarity

EPSILON = 1e-6
"""Offset of the scaled relevance, as published."""
ROUNDING = 1e-5
"""Share of a token's weight below which a gain is rounding. At 1e-6, an image of more tokens than dimensions was not
always pruned alike alone and in a batch."""


@torch.no_grad()
def cdpruner(tokens: VisualTokens, num_keep: Tensor) -> Tensor:
    """Greedy MAP of a determinantal point process whose kernel is cosine similarity times relevance to the text.

    Relevance comes from CLIP or from the language model (dualspeed.method.relevance). Different from the repository:
    relevance is scaled to [0, 1] within each image, not within the batch, so that an image's tokens do not depend on
    its batch mates; picked tokens are masked, so that a budget above the rank of the features repeats no token: once
    no token adds to the determinant, the lower index comes first.
    """
    valid = tokens.valid()
    quality = min_max_scaled(tokens.require("relevance").float(), valid)
    kernel = cosine_similarity(tokens.features).mul_(quality[:, :, None]).mul_(quality[:, None])
    return sort_picks(greedy_map(kernel, valid, int(num_keep.max())), num_keep)


def min_max_scaled(relevance: Tensor, valid: Tensor) -> Tensor:
    """(B, N) relevance scaled to [0, 1] over the valid tokens of each image; all 1 if they are equal."""
    lowest = relevance.masked_fill(~valid, torch.inf).amin(dim=1, keepdim=True)
    highest = relevance.masked_fill(~valid, -torch.inf).amax(dim=1, keepdim=True)
    span = highest - lowest
    return torch.where(span > 0, (relevance - lowest + EPSILON) / span.clamp(min=torch.finfo(span.dtype).tiny), 1.0)


def greedy_map(kernel: Tensor, valid: Tensor, num_picks: int, rounding: float = ROUNDING) -> Tensor:
    """Fast greedy MAP inference (Chen et al., arXiv 1709.05135): an incremental Cholesky factorisation.

    Args:
        kernel: (B, N, N) positive semidefinite.
        valid: (B, N) tokens that can be picked.
        rounding: share of a token's weight below which a gain counts as 0; 0 for a kernel of full rank.

    Returns:
        (B, num_picks) tokens in order of choice, invalid ones last.
    """
    batch_size, num_tokens = valid.shape
    # gain: factor by which a token would multiply the determinant; factor: rows of the Cholesky factor so far.
    weight = kernel.diagonal(dim1=1, dim2=2)
    gain = weight
    factor = kernel.new_zeros(batch_size, num_picks, num_tokens)
    picks = torch.zeros(batch_size, num_picks, dtype=torch.long, device=kernel.device)
    taken = ~valid
    for step in range(num_picks):
        # Rounding leaves a small gain where the exact one is 0; it counts as 0, so that ties go to the lower index.
        exact_gain = torch.where(gain > rounding * weight, gain, 0.0)
        pick = lowest_of_highest(exact_gain.masked_fill(taken, -torch.inf), weight)
        picks[:, step] = pick[:, 0]
        taken = taken.scatter(1, pick, True)
        kernel_row = kernel.gather(1, pick[..., None].expand(-1, -1, num_tokens))[:, 0]
        earlier = factor[:, :step]
        of_pick = earlier.gather(2, pick[:, None].expand(-1, step, -1))
        pick_gain = exact_gain.gather(1, pick)
        row = torch.where(pick_gain > 0, (kernel_row - (of_pick * earlier).sum(dim=1)) / pick_gain.sqrt(), 0.0)
        factor[:, step] = row
        gain = gain - row.square()
    return picks


PRUNER = Pruner(
    cdpruner,
    keeps="the most diverse of the tokens that are relevant to the question",
    paper="2506.10967",
    needs=("relevance",),
)
