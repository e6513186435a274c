"""Losses by mode and throughput between two records of the log, summed on the device."""

import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from dualspeed.batch import IGNORE_INDEX
from dualspeed.method.outputs import DualSpeedOutput
from dualspeed.settings.modes import Mode


class Totals:
    """Sums over the micro-batches since the last record; `logs` copies them to the host, once."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self._losses: dict[tuple[Mode, str], list[Tensor]] = defaultdict(list)
        self._steps: dict[Mode, set[int]] = defaultdict(set)
        self._sums: dict[str, list[Tensor]] = defaultdict(list)
        self._started = time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        """Leave a pause of this length out of the throughput."""
        self._started += seconds

    def add(self, inputs: Mapping[str, Any], outputs: DualSpeedOutput, mode: Mode, step: int, scale: int) -> None:
        """Add a micro-batch of an optimizer step; `scale` turns a rank's share of a loss into its term of the mean."""
        input_ids = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        self._steps[mode].add(step)
        self._sums["tokens"].append(input_ids.new_full((), input_ids.numel()) if mask is None else mask.sum())
        self._sums["samples"].append(input_ids.new_full((), len(input_ids)))
        self._sums["batches_without_supervision"].append(has_no_supervision(outputs))
        self._losses[mode, "ce_loss"].append(outputs.ce_loss.detach() * scale)
        if outputs.distillation_loss is not None:
            self._losses[mode, "distillation_loss"].append(outputs.distillation_loss.detach() * scale)

    def logs(self, accelerator: Accelerator) -> dict[str, float]:
        """Mean losses by mode, and throughput, of all ranks together; each rank must call it. Begins anew."""
        seconds = time.perf_counter() - self._started
        # The loss of a step is the sum over its micro-batches, which are shares of it, and the mean over ranks.
        losses = {
            f"{mode}/{name}": torch.stack(values).sum() / len(self._steps[mode])
            for (mode, name), values in self._losses.items()
        }
        totals = {name: torch.stack(values).sum() for name, values in self._sums.items()}
        logs, sums = reduced(accelerator, losses, "mean"), reduced(accelerator, totals, "sum")
        for name in ("tokens", "samples"):
            logs[f"{name}_per_second"] = sums[name] / seconds
        self.clear()
        return logs | {"batches_without_supervision": sums["batches_without_supervision"]}


def has_no_supervision(outputs: DualSpeedOutput) -> Tensor:
    """True, as a scalar on the device, if no token of the batch is supervised."""
    if outputs.labels is None:
        return outputs.ce_loss.new_full((), len(outputs.logits) == 0)
    return (outputs.labels[:, 1:] == IGNORE_INDEX).all().float()


def reduced(accelerator: Accelerator, values: Mapping[str, Tensor], reduction: str) -> dict[str, float]:
    """Scalars of the same names on every rank -> their `mean` or `sum` over ranks, copied to the host at once."""
    stacked = torch.stack([value.float() for value in values.values()])
    return dict(zip(values, accelerator.reduce(stacked, reduction).tolist(), strict=True))
