"""The mode isolator (arXiv 2602.03815, section 3)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ISOLATOR_FILE = "mode_isolator.safetensors"
"""File beside a stock checkpoint."""


class ModeIsolator(nn.Module):
    """l learnable embeddings before the kept tokens of each image, which mark a sequence as pruned."""

    def __init__(self, num_virtual_tokens: int, hidden_size: int, dtype: torch.dtype | None = None) -> None:
        """Draw initial values from U(-1/sqrt(D), 1/sqrt(D)) as published, the scale of the image features."""
        super().__init__()
        bound = 1 / math.sqrt(hidden_size)
        self.weight = nn.Parameter(torch.empty(num_virtual_tokens, hidden_size, dtype=dtype).uniform_(-bound, bound))

    def forward(self) -> Tensor:
        """(l, D) embeddings, by lookup: sharding frees the weight itself once the module has run."""
        return F.embedding(torch.arange(len(self.weight), device=self.weight.device), self.weight)
