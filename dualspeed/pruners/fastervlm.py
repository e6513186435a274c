"""FasterVLM: keep the tokens with the most attention from the CLS token (arXiv 2412.01818, Theia-4869/FasterVLM)."""

import torch
from torch import Tensor

from dualspeed.pruners.contract import Pruner, VisualTokens
from dualspeed.pruners.selection import select_top_k


def fastervlm(tokens: VisualTokens, num_keep: Tensor) -> Tensor:
    """Top k by CLS attention in the layer that yields the features, mean over heads."""
    scores = tokens.require("cls_attention").float().masked_fill(~tokens.valid(), -torch.inf)
    return select_top_k(scores, num_keep)


PRUNER = Pruner(
    fastervlm,
    keeps="the tokens with the most attention from the CLS token",
    paper="2412.01818v1",
    needs=("cls_attention",),
)
