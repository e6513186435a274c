"""Sequence lengths that samples are grouped into batches by."""

import numpy as np
from datasets import Dataset

from dualspeed.settings.budget import num_tokens_to_keep
from dualspeed.settings.method import DualSpeedConfig

FULL_LENGTH, PRUNED_LENGTH = "num_tokens", "num_pruned_tokens"


def group_lengths(dataset: Dataset, method: DualSpeedConfig) -> tuple[Dataset, str]:
    """Dataset with the column to group by, and the column's name: the length in the mode that most steps run in.

    The length in fast mode is an estimate: all images of a row count as one unit of pruning, while an isolator and the
    rounding of k belong to each image or tile.
    """
    if method.slow_mode_ratio > 0.5 or "num_image_tokens" not in dataset.column_names:
        return dataset, FULL_LENGTH
    full, visual = (np.array(dataset.data.column(name)) for name in (FULL_LENGTH, "num_image_tokens"))
    counts, positions = np.unique(visual, return_inverse=True)
    kept = np.array([_pruned_unit_length(count, method) for count in counts.tolist()])[positions]
    return dataset.add_column(PRUNED_LENGTH, (full - visual + kept).astype(np.int32)), PRUNED_LENGTH


def _pruned_unit_length(num_tokens: int, method: DualSpeedConfig) -> int:
    """Isolator and kept tokens of an image; 0 for a row without one."""
    if num_tokens == 0:
        return 0
    return num_tokens_to_keep(num_tokens, method.pruning_ratio) + method.num_virtual_tokens
