"""Sequence lengths that samples are grouped into batches by."""

from typing import TYPE_CHECKING

import numpy as np

from dualspeed.settings.budget import num_tokens_to_keep
from dualspeed.settings.method import DualSpeedConfig

if TYPE_CHECKING:
    from datasets import Dataset

FULL_LENGTH, NUM_IMAGE_TOKENS, PRUNED_LENGTH = "num_tokens", "num_image_tokens", "num_pruned_tokens"


def group_lengths(dataset: "Dataset", method: DualSpeedConfig) -> tuple["Dataset", str]:
    """Dataset with the column to group by, and the column's name: the length in the mode that most steps run in.

    The length in fast mode is an estimate: all images of a row count as one unit of pruning, while an isolator and the
    rounding of k belong to each image or tile.
    """
    if method.slow_mode_ratio > 0.5 or NUM_IMAGE_TOKENS not in dataset.column_names:
        return dataset, FULL_LENGTH
    return dataset.add_column(PRUNED_LENGTH, pruned_lengths(dataset, method).astype(np.int32)), PRUNED_LENGTH


def pruned_lengths(dataset: "Dataset", method: DualSpeedConfig) -> np.ndarray:
    """(rows,) the estimate of each row's length in fast mode, of prepared data."""
    full, visual = (np.array(dataset.data.column(name)) for name in (FULL_LENGTH, NUM_IMAGE_TOKENS))
    counts, positions = np.unique(visual, return_inverse=True)
    kept = np.array([pruned_unit_length(count, method) for count in counts.tolist()])[positions]
    return full - visual + kept


def pruned_unit_length(num_tokens: int, method: DualSpeedConfig) -> int:
    """Isolator and kept tokens of an image; 0 for a row without one."""
    if num_tokens == 0:
        return 0
    return num_tokens_to_keep(num_tokens, method.pruning_ratio) + method.num_virtual_tokens
