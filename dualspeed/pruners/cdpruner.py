"""CDPruner: the most diverse tokens among those that matter to the question (arXiv 2506.10967, Theia-4869/CDPruner)."""

import torch
from torch import Tensor

from dualspeed.pruners.contract import VisualTokens, ascending, cosine_similarity

EPSILON = 1e-6
"""Added to relevance as published; and the share of a token's own weight below which its gain is rounding error."""


@torch.no_grad()
def cdpruner(tokens: VisualTokens, num_keep: Tensor) -> Tensor:
    """Greedy MAP of a determinantal point process whose kernel is cosine similarity times relevance to the text.

    Relevance comes from CLIP or from the language model (dualspeed.method.relevance). Different from the repository: it
    is scaled to [0, 1] within each image, not within the batch, so that an image's tokens don't depend on its batch
    mates; picked tokens are masked, so that a budget above the rank of the features repeats none: once nothing adds
    to the determinant, the lower index comes first.
    """
    tokens.check("cdpruner", *cdpruner.needs)
    valid = tokens.valid()
    quality = scaled(tokens.relevance.float(), valid)
    kernel = cosine_similarity(tokens.features).mul_(quality[:, :, None]).mul_(quality[:, None])
    return ascending(greedy_map(kernel, valid, int(num_keep.max())), num_keep)


cdpruner.needs = ("relevance",)


def scaled(relevance: Tensor, valid: Tensor) -> Tensor:
    """(B, N) min-max scaled over the valid tokens of each image; all 1 where they are alike."""
    lowest = relevance.masked_fill(~valid, torch.inf).amin(dim=1, keepdim=True)
    highest = relevance.masked_fill(~valid, -torch.inf).amax(dim=1, keepdim=True)
    span = highest - lowest
    return torch.where(span > 0, (relevance - lowest + EPSILON) / span.clamp(min=torch.finfo(span.dtype).tiny), 1.0)


def greedy_map(kernel: Tensor, valid: Tensor, num_picks: int) -> Tensor:
    """Fast greedy MAP inference (Chen et al., arXiv 1709.05135): an incremental Cholesky factorisation.

    Args:
        kernel: (B, N, N) positive semidefinite.
        valid: (B, N) tokens that can be picked.

    Returns:
        (B, num_picks) tokens in order of choice, invalid ones last.
    """
    batch_size, num_tokens = valid.shape
    # What a token would still add to the determinant, and its row of the Cholesky factor so far.
    weight = kernel.diagonal(dim1=1, dim2=2)
    gain = weight
    factor = kernel.new_zeros(batch_size, num_picks, num_tokens)
    picks = torch.zeros(batch_size, num_picks, dtype=torch.long, device=kernel.device)
    taken = ~valid
    for step in range(num_picks):
        # Rounding leaves a little of what is spent; taken for nothing, so that ties go by index.
        spendable = torch.where(gain > EPSILON * weight, gain, 0.0)
        pick = spendable.masked_fill(taken, -torch.inf).argmax(dim=-1, keepdim=True)
        picks[:, step] = pick[:, 0]
        taken = taken.scatter(1, pick, True)
        to_all = kernel.gather(1, pick[..., None].expand(-1, -1, num_tokens))[:, 0]
        known = factor[:, :step]
        own = known.gather(2, pick[:, None].expand(-1, step, -1))
        picked_gain = spendable.gather(1, pick)
        row = torch.where(picked_gain > 0, (to_all - (own * known).sum(dim=1)) / picked_gain.sqrt(), 0.0)
        factor[:, step] = row
        gain = gain - row.square()
    return picks
