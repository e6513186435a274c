"""Settings of one training run, and the key by which rows share a pretraining."""

import dataclasses
from dataclasses import dataclass

from dualspeed.settings.fields import check_fields, choice
from dualspeed.settings.identity import key_of
from dualspeed.settings.method import DualSpeedConfig
from dualspeed.settings.model import STAGES, ModelConfig
from dualspeed.settings.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """Everything that one training run depends on, but its input files."""

    stage: str = choice(STAGES)
    """pretrain or finetune."""
    seed: int
    """Seed of data order, initialisation and mode schedule."""
    recipe: Recipe
    """Data and training arguments."""
    dualspeed: DualSpeedConfig
    """Settings of the method."""

    def __post_init__(self) -> None:
        check_fields(self)


def pretrain_settings(model: ModelConfig, dualspeed: DualSpeedConfig, seed: int) -> StageSettings:
    """Settings of the pretraining that a row starts from: on full tokens if r = 1, else in fast mode only.

    Settings without an effect on it are set to their defaults, so that rows which share a pretraining ask for the same.
    """
    config = dataclasses.replace(dualspeed, distillation_weight=0.0)
    if config.slow_mode_ratio == 1:
        default = DualSpeedConfig()
        config = dataclasses.replace(
            config,
            pruner=default.pruner,
            pruning_ratio=default.pruning_ratio,
            relevance_clip=None,
            pixel_pruning=None,
        )
    else:
        config = dataclasses.replace(config, slow_mode_ratio=0.0)
    return StageSettings(stage="pretrain", seed=seed, recipe=model.stages.pretrain, dualspeed=config)


def finetune_settings(model: ModelConfig, dualspeed: DualSpeedConfig, seed: int) -> StageSettings:
    """Settings of the finetuning that makes a row's model."""
    return StageSettings(stage="finetune", seed=seed, recipe=model.stages.finetune, dualspeed=dualspeed)


def pretrain_key(model: str, settings: StageSettings) -> str:
    """Folder name of a pretraining; rows with the same key share it."""
    mode = "full" if settings.dualspeed.slow_mode_ratio == 1 else "fast"
    return f"{model}-{mode}-seed{settings.seed}-{key_of(settings)}"
