"""Number of visual tokens that pruning keeps."""

import math


def num_tokens_to_keep(num_tokens: int, pruning_ratio: float) -> int:
    """k = max(1, floor((1 - p) N + 1e-6)) of N tokens; the epsilon because 1 - 0.9 is below 0.1 in floating point."""
    return max(1, math.floor((1 - pruning_ratio) * num_tokens + 1e-6))
