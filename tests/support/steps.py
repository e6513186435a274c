"""A training step of each mode on one batch, without a trainer."""

from collections.abc import Callable
from typing import Any

import torch

from dualspeed import DualSpeedModel, Mode


def training_steps(model: DualSpeedModel, batch: dict[str, Any]) -> dict[str, Callable[[], None]]:
    """Functions that run a step of each mode on the same weights, which a learning rate of 0 leaves as they are."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0)

    def step(**mode: Any) -> None:
        optimizer.zero_grad()
        model(**batch, **mode).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return {
        "baseline": lambda: step(mode=Mode.SLOW, distill=False),
        "fast": lambda: step(mode=Mode.FAST),
        "slow": lambda: step(mode=Mode.SLOW),
    }
