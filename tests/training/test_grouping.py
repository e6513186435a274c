"""Lengths that samples are grouped by."""

import numpy as np
import pytest
from datasets import Dataset

from dualspeed import DualSpeedConfig
from dualspeed.training.grouping import group_lengths


@pytest.mark.parametrize("num_virtual_tokens", [0, 4])
def test_a_small_image_keeps_one_token(num_virtual_tokens):
    """As the pruner does: 10 % of 5 tokens is less than one."""
    rows = Dataset.from_dict({"num_tokens": [25, 30, 20], "num_image_tokens": [5, 10, 0]})
    method = DualSpeedConfig(pruning_ratio=0.9, num_virtual_tokens=num_virtual_tokens)
    grouped, name = group_lengths(rows, method)
    assert grouped[name][:] == [20 + 1 + num_virtual_tokens, 20 + 1 + num_virtual_tokens, 20]
    assert np.array(grouped.data.column(name)).dtype == np.int32
