"""Uniform: every N/k-th token in raster order, a control that reads no features."""

from torch import Tensor

from dualspeed.pruners.contract import Pruner, VisualTokens
from dualspeed.pruners.selection import evenly_spaced, mask_to_indices


def uniform(tokens: VisualTokens, num_keep: Tensor) -> Tensor:
    """Keep the tokens at the centres of k equal segments of the image."""
    return mask_to_indices(evenly_spaced(tokens.valid(), num_keep), num_keep)


PRUNER = Pruner(uniform, keeps="every N/k-th token")
