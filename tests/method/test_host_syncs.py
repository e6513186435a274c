"""Host-device syncs of a step: each waits for all launched kernels, so their number must not grow with the batch.

Counted on the CPU, as the operations that would wait on a GPU; there, `tolist` of a tensor is one sync more.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dualspeed import DualSpeedConfig, DualSpeedModel, Mode
from tests.support import tiny
from tests.support.batches import collate, sample

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "repeat_interleave.Tensor")


class Waits(TorchDispatchMode):
    """Counter of operations whose result, or its shape, the host must know."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = str(operation)
        by_mask = name.startswith(("aten.index.", "aten.index_put")) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        is_output_size_given = "repeat_interleave" in name and (kwargs or {}).get("output_size") is not None
        waits = any(part in name for part in WAITING) and not is_output_size_given
        self.count += bool(waits or by_mask)
        return operation(*args, **(kwargs or {}))


def batch_of(num_samples: int) -> dict[str, torch.Tensor]:
    """Batch of samples with one or two images."""
    return collate([sample("llava", seed, 1 + seed % 2) for seed in range(num_samples)])


def waits(call) -> int:
    with Waits() as counted:
        call()
    return counted.count


@pytest.mark.parametrize("mode", Mode)
def test_a_step_waits_as_often_however_many_samples_and_images_it_has(mode):
    model = DualSpeedModel(tiny.llava(), DualSpeedConfig(pruning_ratio=0.5))
    small, large = (waits(lambda n=n: model(mode=mode, **batch_of(n)).loss.backward()) for n in (2, 7))
    assert small == large > 0
