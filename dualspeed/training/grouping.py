"""Lengths that batches are grouped by: those of the steps that are most."""

import numpy as np
from datasets import Dataset

from dualspeed.settings.method import DualSpeedConfig

FULL_LENGTH, PRUNED_LENGTH = "num_tokens", "num_pruned_tokens"


def group_lengths(dataset: Dataset, method: DualSpeedConfig) -> tuple[Dataset, str]:
    """A prepared dataset and the column to group its rows by: pruned lengths, unless most steps are slow.

    An image counts as one unit of pruning, so that tiles' isolators and roundings are left out.
    """
    if method.slow_mode_ratio > 0.5 or "num_image_tokens" not in dataset.column_names:
        return dataset, FULL_LENGTH
    full, visual = (np.array(dataset.data.column(name)) for name in (FULL_LENGTH, "num_image_tokens"))
    kept = np.floor((1 - method.pruning_ratio) * visual + 1e-6) + method.num_virtual_tokens
    pruned = full - visual + np.where(visual > 0, kept, 0)
    return dataset.add_column(PRUNED_LENGTH, pruned.astype(np.int32)), PRUNED_LENGTH
