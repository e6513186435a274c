"""Trainings of one stage on a tiny model and the 24 conversations of the fixture `stage_inputs`."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from dualspeed import DualSpeedConfig
from dualspeed.settings.recipe import Recipe
from dualspeed.settings.stage import StageSettings
from dualspeed.training.stage import train

NUM_STEPS = 12


def stage_settings(stage: str = "finetune", seed: int = 0, **dualspeed) -> StageSettings:
    """Settings of NUM_STEPS steps with a checkpoint after every second one; `dualspeed` are the method's."""
    recipe = Recipe(
        annotations="unused.json",
        images="unused",
        chat_template="turns",
        global_batch_size=4,
        training_arguments={
            "use_cpu": True,
            "max_steps": NUM_STEPS,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 2,
        },
    )
    config = DualSpeedConfig(**({"slow_mode_ratio": 0.4, "pruning_ratio": 0.7} | dualspeed))
    return StageSettings(stage=stage, seed=seed, recipe=recipe, dualspeed=config)


def interruptible_settings() -> StageSettings:
    """Settings with a data loading worker and a last step in the middle of an epoch."""
    chosen = stage_settings()
    chosen.recipe.training_arguments.update(max_steps=NUM_STEPS + 1, dataloader_num_workers=1)
    return chosen


def train_stage(stage_inputs: Path, folder: Path, chosen: StageSettings, model: Path | None = None) -> Path:
    """Train below `folder`, from `model` or the base checkpoint; folder of the trained checkpoint."""
    train(chosen, model or stage_inputs / "base", stage_inputs / "data", folder / "state", folder / "out")
    return folder / "out"


def assert_same_weights(one: Path, other: Path) -> None:
    """Bit for bit: the model's and the isolator's."""
    for name in ("model.safetensors", "mode_isolator.safetensors"):
        left, right = load_file(one / name), load_file(other / name)
        assert all(torch.equal(left[key], right[key]) for key in right)
