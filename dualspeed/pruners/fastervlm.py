"""FasterVLM: keep the tokens that the vision tower's CLS token attends to (arXiv 2412.01818, Theia-4869/FasterVLM)."""

from torch import Tensor

from dualspeed.pruners.contract import VisualTokens, select_top_k


def fastervlm(tokens: VisualTokens, num_keep: Tensor) -> Tensor:
    """Top k by CLS attention in the layer that yields the features, mean over heads."""
    tokens.check("fastervlm", *fastervlm.needs)
    scores = tokens.cls_attention.float().masked_fill(~tokens.valid(), -float("inf"))
    return select_top_k(scores, num_keep)


fastervlm.needs = ("cls_attention",)
