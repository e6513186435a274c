"""Greedy coverage: pick tokens one by one so that together they cover as much as possible.

B images, N tokens per image, R things to be covered; a token covers each of them to some degree, and a set of tokens
covers it as well as the best of them.
"""

import torch
from torch import Tensor

from dualspeed.pruners.similarity import STRIP_ROWS

LAZY_FROM = 1024
"""Number of tokens from which a CPU computes gains lazily. On an accelerator each turn would be a host-device sync."""
LAZY_TOKENS = 64
"""Tokens whose gains are computed anew at once."""


def greedy_cover(covers: Tensor, weight: Tensor, valid: Tensor, num_picks: int) -> Tensor:
    """Pick the token with the largest weighted gain in coverage, again and again; ties go to the lower index.

    Args:
        covers: (B, N, R) degree to which each token covers each thing; what is below 0 covers nothing.
        weight: (B, N) factor of each token's gain; tokens with a negative one are picked last, by index.
        valid: (B, N) tokens that can be picked.

    Returns:
        (B, num_picks) tokens in order of choice, invalid ones last.
    """
    covered = covers.new_zeros(len(covers), covers.shape[2])
    gain = weighted(gains(covers, covered), weight).masked_fill(~valid, -torch.inf)
    is_lazy = covers.device.type == "cpu" and covers.shape[1] >= LAZY_FROM
    images = torch.arange(len(covers), device=covers.device)
    picks = []
    for step in range(num_picks):
        if step > 0 and is_lazy:
            gain = refreshed_best(gain, covers, covered, weight)
        elif step > 0:
            gain = torch.where(gain == -torch.inf, gain, weighted(gains(covers, covered), weight))
        pick = gain.argmax(dim=-1)
        picks.append(pick)
        gain = gain.scatter(1, pick[:, None], -torch.inf)
        covered = torch.maximum(covered, covers[images, pick])
    return torch.stack(picks, dim=1)


def gains(covers: Tensor, covered: Tensor) -> Tensor:
    """(B, M) sum over all things of what each token's `covers` (B, M, R) adds to the `covered` (B, R)."""
    # Strip by strip: all tokens at once would be the pruner's largest tensor.
    strips = covers.split(STRIP_ROWS, dim=1)
    return torch.cat([(strip - covered[:, None]).clamp_(min=0).sum(dim=-1) for strip in strips], dim=1)


def weighted(gain: Tensor, weight: Tensor) -> Tensor:
    """(B, M) gains times weights; -1, below every gain, where the weight is negative."""
    return torch.where(weight < 0, -1.0, gain * weight)


def refreshed_best(gain: Tensor, covers: Tensor, covered: Tensor, weight: Tensor) -> Tensor:
    """(B, N) gains of which the highest is exact; the others may be those of an earlier step, which were no lower.

    Coverage is submodular: what a token adds only shrinks with each pick. So the token with the highest old gain is the
    best one as soon as its gain has been computed anew.
    """
    num_tokens = min(LAZY_TOKENS, gain.shape[1])
    images = torch.arange(len(gain), device=gain.device)[:, None]
    is_exact = gain == -torch.inf
    # Most steps take one turn.
    while not is_exact.gather(1, gain.argmax(dim=-1, keepdim=True)).all():
        highest = gain.masked_fill(is_exact, -torch.inf).topk(num_tokens, dim=-1).indices
        anew = weighted(gains(covers[images, highest], covered), weight.gather(1, highest))
        # topk fills up with tokens that are exact already where fewer are left.
        gain = gain.scatter(1, highest, torch.where(is_exact.gather(1, highest), gain.gather(1, highest), anew))
        is_exact = is_exact.scatter(1, highest, True)
    return gain
