"""FasterVLM: keep the tokens that the vision tower's CLS token attends to (arXiv 2412.01818, Theia-4869/FasterVLM)."""

from torch import Tensor

from dualspeed.pruners.tokens import VisualTokens, select_top_k


def fastervlm(tokens: VisualTokens, num_keep: Tensor) -> Tensor:
    """Top k by CLS attention in the layer that yields the features, mean over heads."""
    if tokens.cls_attention is None:
        raise ValueError("fastervlm needs VisualTokens.cls_attention: (B, N) attention of the CLS token to each token")
    scores = tokens.cls_attention.float().masked_fill(~tokens.valid(), -float("inf"))
    return select_top_k(scores, num_keep)


fastervlm.needs = ("cls_attention",)
