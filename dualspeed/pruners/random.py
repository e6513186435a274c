"""Random selection: the control that every other method has to beat."""

import torch
from torch import Tensor

from dualspeed.pruners.contract import Pruner, VisualTokens
from dualspeed.pruners.selection import select_top_k


def random(tokens: VisualTokens, num_keep: Tensor) -> Tensor:
    """Keep k tokens drawn uniformly, as a pure function of each image's seed.

    Scores are a hash of (seed, index) instead of draws from a generator with state. So a resumed training prunes like
    an uninterrupted one, an image is pruned alike alone and in a batch, and a GPU prunes like a CPU.
    """
    device = tokens.features.device
    seeds = splitmix64(tokens.require("seeds").to(device))
    hashes = splitmix64(seeds[:, None] + torch.arange(tokens.features.shape[1], device=device))
    # 24 bits are exact in float32; ties go to the lower index.
    scores = (hashes & 0xFFFFFF).float().masked_fill(~tokens.valid(), -torch.inf)
    return select_top_k(scores, num_keep)


def splitmix64(values: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele et al. 2014) on int64; products wrap around as in unsigned arithmetic."""
    values = values + -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed number
    values = (values ^ logical_shift_right(values, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    values = (values ^ logical_shift_right(values, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return values ^ logical_shift_right(values, 31)


def logical_shift_right(values: Tensor, bits: int) -> Tensor:
    """Shift int64 right and fill with zeros; torch's own shift copies the sign bit."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


PRUNER = Pruner(random, keeps="random tokens", needs=("seeds",))
