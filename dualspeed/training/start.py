"""Checks before a training's processes are started: what can't work is said once, at once."""

import os
from pathlib import Path

from dualspeed.errors import ConfigError
from dualspeed.settings.recipe import Recipe, batch_plan
from dualspeed.settings.sharding import check_fit, read_sharding
from dualspeed.settings.stage import StageSettings
from dualspeed.training.state import CHECKPOINTS, check_num_processes, check_sharding, last_checkpoint, open_state


def check_start(
    settings: StageSettings,
    model_folder: Path,
    data_folder: Path,
    state_root: Path,
    nodes: int,
    processes: int,
    accelerate_config: str | None,
) -> None:
    """Raise the error that training in these processes would end with; nothing in a process that is one of them.

    Args:
        model_folder, data_folder, state_root: as for `dualspeed.training.stage.train`.
        processes: training processes on each of the nodes.
        accelerate_config: file for `accelerate launch`; None: DDP.

    Raises:
        ConfigError: the strategy isn't known or doesn't fit the recipe, processes don't divide the batch, or too few
            accelerators are there.
        WorldSizeError, ShardingError: the run was started on another number of processes, or by another strategy.
        CheckpointError: model or data are missing.
    """
    if "RANK" in os.environ:
        return  # the process that started this one has checked
    recipe, sharding = settings.recipe, read_sharding(accelerate_config)
    check_fit(sharding, recipe)
    batch_plan(recipe.global_batch_size, nodes * processes, recipe.per_device_batch_size or 1)
    check_accelerators(recipe, processes)
    state = open_state(state_root, settings, model_folder, data_folder)
    checkpoint = last_checkpoint(state / CHECKPOINTS)
    check_num_processes(checkpoint, nodes * processes)
    check_sharding(checkpoint, sharding.name)


def check_accelerators(recipe: Recipe, processes: int) -> None:
    """Raise ConfigError if a recipe for accelerators finds fewer than one for each of this machine's processes."""
    if recipe.training_arguments.get("use_cpu") or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true"):
        return
    import torch  # takes seconds, which a training on CPUs need not wait for

    found = torch.accelerator.device_count()
    if found < processes:
        kind = torch.accelerator.current_accelerator()
        raise ConfigError(
            f"resources: {processes} training processes with an accelerator each, but this machine has "
            f"{found or 'none'}{f' ({kind.type})' if kind else ''}; valid: as many as there are (`gpu` and `processes` "
            "of the model's resources), or `use_cpu: true` in training_arguments"
        )
