"""Centred similarity: cosines of features without the direction that all tokens of an image share (Cen-Prune).

arXiv 2608.30263: features of one image lie in a narrow cone, so that their cosines are all high; minus their mean, the
features differ again. B images, N tokens per image, C width of the compared features.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from dualspeed.pruners.cdpruner import min_max_scaled
from dualspeed.pruners.contract import VisualTokens
from dualspeed.pruners.similarity import cosine_similarity

ROUNDING = 1e-6
"""Share of a vector, or of the range of cosines, below which a difference is rounding."""


def compared_features(tokens: VisualTokens) -> Tensor:
    """(B, N, C) features that are compared: those before a tower's own merger, elsewhere the projected ones."""
    return tokens.features if tokens.before_merger is None else tokens.before_merger


def centred_similarity(tokens: VisualTokens) -> Tensor:
    """(B, N, N) cosines of the compared features minus their mean over the image's tokens.

    A token that differs from the mean by rounding alone has similarity 0 to all tokens.
    """
    vectors, counted = compared_features(tokens).float(), tokens.valid()[..., None]
    mean = vectors.masked_fill(~counted, 0.0).sum(dim=1, keepdim=True) / counted.sum(dim=1, keepdim=True).clamp(min=1)
    differences = vectors - mean
    is_rounding = differences.norm(dim=-1, keepdim=True) <= ROUNDING * vectors.norm(dim=-1, keepdim=True)
    return cosine_similarity(differences.masked_fill_(is_rounding, 0.0))


def distinctiveness(tokens: VisualTokens) -> Tensor:
    """(B, N) weight g of each token: the higher, the less similar it is to the image's other tokens on average.

    Minus the mean cosine to the others, scaled to [0, 1] over the image; for features before a merger the sigmoid of
    its z-score, as published. Equal for all tokens of an image whose mean cosines differ by rounding alone.
    """
    valid = tokens.valid()
    unit = F.normalize(compared_features(tokens).float(), dim=-1).masked_fill_(~valid[..., None], 0.0)
    num_others = (valid.sum(dim=1, keepdim=True) - 1).clamp(min=1)
    dissimilarity = -(unit * (unit.sum(dim=1, keepdim=True) - unit)).sum(dim=-1) / num_others
    return (min_max_scaled if tokens.before_merger is None else sigmoid_of_z_score)(
        without_rounding(dissimilarity, valid), valid
    )


def without_rounding(values: Tensor, valid: Tensor) -> Tensor:
    """(B, N) values, all 0 in an image whose values differ by rounding alone."""
    span = values.masked_fill(~valid, -torch.inf).amax(dim=1) - values.masked_fill(~valid, torch.inf).amin(dim=1)
    return torch.where((span > ROUNDING)[:, None], values, 0.0)


def sigmoid_of_z_score(values: Tensor, valid: Tensor) -> Tensor:
    """(B, N) sigmoid of the values minus their mean over their standard deviation in the image; 0.5 if they are equal.

    The deviation is that of all N values, not an estimate from a sample.
    """
    num_tokens = valid.sum(dim=1, keepdim=True).clamp(min=1)
    differences = values - values.masked_fill(~valid, 0.0).sum(dim=1, keepdim=True) / num_tokens
    variance = differences.masked_fill(~valid, 0.0).square().sum(dim=1, keepdim=True) / num_tokens
    return torch.where(variance > 0, differences * variance.rsqrt(), 0.0).sigmoid()
