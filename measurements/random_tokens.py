"""Random visual tokens with every field that a pruner can need."""

import torch

from dualspeed.pruners import VisualTokens

KEY_SHAPE, TOWER_WIDTH, QUESTION_TOKENS = (16, 64), 1024, 24


def random_tokens(batch_size: int, num_tokens: int, width: int, device: str | torch.device) -> VisualTokens:
    """Float32 tokens of `batch_size` images, drawn on the device."""
    torch.manual_seed(0)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(batch_size, num_tokens, *sizes, device=device)

    return VisualTokens(
        features=normal(width),
        cls_attention=normal().softmax(dim=-1),
        keys=normal(*KEY_SHAPE),
        pre_projection=normal(TOWER_WIDTH),
        before_merger=normal(TOWER_WIDTH),
        relevance=normal(),
        text_similarity=normal(QUESTION_TOKENS) / 10,
        seeds=torch.arange(batch_size, device=device),
    )
