"""Uniform: every N/k-th token in raster order, the control that looks at nothing."""

from torch import Tensor

from dualspeed.pruners.contract import VisualTokens, evenly_spaced, first, positions_of


def uniform(tokens: VisualTokens, num_keep: Tensor) -> Tensor:
    """The tokens in the middle of k equal stretches of the image."""
    positions = positions_of(evenly_spaced(tokens.valid(), num_keep))[:, : int(num_keep.max())]
    return positions.masked_fill(~first(num_keep, positions), -1)


uniform.needs = ()
