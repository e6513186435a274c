"""Parameter groups of the optimizer: projector and vision tower may have learning rates of their own."""

from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from dualspeed.errors import ConfigError
from dualspeed.method.model import DualSpeedModel
from dualspeed.training.trainable import parts_of

GROUPED = ("projector", "vision")
"""Parts with groups of their own; all other parameters are in the groups `model`."""


def split_groups(
    optimizer: torch.optim.Optimizer,
    model: DualSpeedModel,
    rates: Mapping[str, float | None],
    decaying: Collection[str],
) -> None:
    """Split the groups of a new optimizer by part of the model, and name them.

    Args:
        optimizer: one that has made no step. The stock trainer made its groups, one that decays and one that doesn't.
        rates: learning rate of each part in GROUPED; None: that of the group.
        decaying: names of the parameters with weight decay.

    The isolator never decays. Groups whose further settings differ (GaLore's) stay apart, and groups of other
    parameters than the model's (those of layer-wise optimizers) stay as they are.
    """
    parts = parts_of(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    split: dict[tuple[str, bool, str], dict] = {}
    others = []
    for group in optimizer.param_groups:
        known = [parameter for parameter in group["params"] if parameter in names]
        if len(known) != len(group["params"]):
            others.append(group)
            continue
        members: dict[tuple[str, bool, str], list[nn.Parameter]] = defaultdict(list)
        settings: dict[str, dict[str, Any]] = {}
        for parameter in known:
            name = names[parameter]
            owner = parts[name] if parts[name] in GROUPED else "model"
            is_isolator = "mode_isolator" in name
            own = {**group, "weight_decay": 0.0} if is_isolator and "weight_decay" in group else group
            settings[kept_settings(own)] = own
            members[owner, name in decaying and not is_isolator, kept_settings(own)].append(parameter)
        for (part, decays, kept), parameters in members.items():
            if (part, decays, kept) in split:
                split[part, decays, kept]["params"] += parameters
                continue
            rate = rates.get(part)
            number = sum(key[:2] == (part, decays) for key in split)
            split[part, decays, kept] = {
                **settings[kept],
                "name": f"{part}{'' if decays else '_no_decay'}{f'_{number + 1}' if number else ''}",
                "params": parameters,
                "lr": group["lr"] if rate is None else rate,
            }
    optimizer.param_groups[:] = [group for _, group in sorted(split.items(), key=lambda item: item[0])] + others


def kept_settings(group: Mapping[str, Any]) -> str:
    """Settings of a group that its parameters keep, such as the rank of GaLore's; equal for equal settings."""
    return repr(sorted((name, value) for name, value in group.items() if name not in ("params", "name", "lr")))


def check_rates(model: DualSpeedModel, rates: Mapping[str, float | None]) -> None:
    """Raise ConfigError for a learning rate of a part that has no trainable parameter."""
    parts = parts_of(model)
    trained = {parts[name] for name, parameter in model.named_parameters() if parameter.requires_grad}
    for part, rate in rates.items():
        if rate and part not in trained:
            raise ConfigError(
                f"{part}_learning_rate: {rate} has no effect, since no parameter of the {part} is trainable; valid: "
                "None, or a model whose parameters there require gradients"
            )
