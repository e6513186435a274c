"""Settings of one training run, and the key by which rows share a pretraining."""

import dataclasses
from dataclasses import dataclass

from dualspeed.errors import ConfigError
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
        check_cache(self.recipe.cache_features, self.dualspeed)
        if (max_steps := self.recipe.training_arguments.get("max_steps", -1)) > 0:
            self.dualspeed.slow_share(max_steps)


def check_cache(cache_features: str | None, dualspeed: DualSpeedConfig) -> None:
    """Raise ConfigError for kept features of images whose pixels are pruned."""
    if cache_features is not None and dualspeed.pixel_pruning is not None:
        pruned = f"with pixel_pruning {dualspeed.pixel_pruning:g} other pixels enter the tower in each mode"
        raise ConfigError(f"cache_features: {cache_features!r}, but {pruned}; valid: one of both")


def pretrain_settings(model: ModelConfig, dualspeed: DualSpeedConfig, seed: int) -> StageSettings | None:
    """Settings of the pretraining that a row starts from: on full tokens if r = 1, else in fast mode only.

    None for a model without a pretraining, whose rows start from the base model.

    Settings without an effect on it are set to their defaults, so that rows which share a pretraining ask for the same.
    """
    if model.stages.pretrain is None:
        return None
    config = dataclasses.replace(dualspeed, distillation_weight=0.0, slow_steps=None)
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


def finetune_settings(
    model: ModelConfig, dualspeed: DualSpeedConfig, seed: int, max_steps: int | None = None
) -> StageSettings:
    """Settings of the finetuning that makes a row's model, in `max_steps` steps if that isn't None."""
    recipe = model.stages.finetune
    if max_steps is not None:
        recipe = dataclasses.replace(recipe, training_arguments=recipe.training_arguments | {"max_steps": max_steps})
    return StageSettings(stage="finetune", seed=seed, recipe=recipe, dualspeed=dualspeed)


def pretrain_key(model: str, settings: StageSettings) -> str:
    """Folder name of a pretraining; rows with the same key share it."""
    mode = "full" if settings.dualspeed.slow_mode_ratio == 1 else "fast"
    return f"{model}-{mode}-seed{settings.seed}-{key_of(settings)}"
