"""Settings of a measurement of step times; rows with the same settings share one."""

import dataclasses
from dataclasses import dataclass

from dualspeed.settings.identity import key_of
from dualspeed.settings.method import DualSpeedConfig
from dualspeed.settings.model import ModelConfig
from dualspeed.settings.recipe import Recipe

NUM_BATCHES = 4
"""Batches that each mode's steps are timed on."""
REPEATS = 3
"""Steps of each mode on each batch."""
THREADS = 1
"""CPU threads of a measurement, as the training rules have: more serve long sequences better than short ones."""
UNTIMED = (
    *("adam_beta", "adam_epsilon", "dataloader_", "disable_tqdm", "eval_", "hub_", "learning_rate", "log"),
    *("lr_scheduler", "max_steps", "num_train_epochs", "project", "push_to_hub", "save_", "warmup_steps"),
    "weight_decay",
)
"""Starts of the names of training arguments that change no step's time."""


@dataclass(frozen=True, kw_only=True)
class SpeedSettings:
    """Everything that a measurement of step times depends on, but model and data."""

    dualspeed: DualSpeedConfig
    """Settings of the method."""
    recipe: Recipe
    """Recipe of the finetuning whose steps are timed, from `timed_recipe`."""
    num_batches: int = NUM_BATCHES
    """Batches of each mode, spread over the lengths of an epoch's batches."""
    repeats: int = REPEATS
    """Steps of each mode on each batch."""
    threads: int = THREADS
    """CPU threads."""


def timed_recipe(recipe: Recipe) -> Recipe:
    """Recipe without what changes no step's time, so that a change of it measures nothing again."""
    return dataclasses.replace(
        recipe,
        max_dropped_share=Recipe.max_dropped_share,
        validation_annotations=None,
        validation_steps=None,
        projector_learning_rate=None,
        vision_learning_rate=None if recipe.vision_learning_rate is None else 0.0,  # the tower is trained, or is not
        training_arguments={
            name: value for name, value in recipe.training_arguments.items() if not name.startswith(UNTIMED)
        },
    )


def speed_settings(model: ModelConfig, dualspeed: DualSpeedConfig) -> SpeedSettings:
    """Settings of the measurement of a row's step times.

    The share of slow steps enters a speedup by arithmetic on the times of a fast and a slow step, and alpha only
    decides whether a teacher runs; so rows that differ in nothing else share a measurement.
    """
    weight = 1.0 if dualspeed.distillation_weight else 0.0
    ratio = DualSpeedConfig().slow_mode_ratio
    return SpeedSettings(
        dualspeed=dataclasses.replace(dualspeed, slow_mode_ratio=ratio, slow_steps=None, distillation_weight=weight),
        recipe=timed_recipe(model.stages.finetune),
    )


def speed_key(name: str, model: ModelConfig, dualspeed: DualSpeedConfig) -> str:
    """File name of the measurement of the steps of the model `name` by this method."""
    teacher = "distilled" if dualspeed.distillation_weight else "plain"
    method = f"{dualspeed.pruner}-p{dualspeed.pruning_ratio:g}-l{dualspeed.num_virtual_tokens}-{teacher}"
    return f"{name}-{method}-{key_of(speed_settings(model, dualspeed))}"
