"""Settings of one training run, and the key by which rows share a pretraining."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dualspeed.errors import ConfigError
from dualspeed.files import sha256_of_json
from dualspeed.settings.method import DualSpeedConfig
from dualspeed.settings.model import STAGES
from dualspeed.settings.project import Experiment, ProjectConfig
from dualspeed.settings.reading import check_choice, read_dataclass
from dualspeed.settings.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """Everything that one training run depends on, but its input files."""

    stage: str
    """pretrain or finetune."""
    seed: int
    """Seed of data order, initialisation and mode schedule."""
    recipe: Recipe
    """Data and training arguments."""
    dualspeed: DualSpeedConfig
    """The method's settings."""

    def __post_init__(self) -> None:
        check_choice("stage", self.stage, STAGES)
        if self.stage == "pretrain" and self.recipe.lora is not None:
            raise ConfigError("stages.pretrain.lora: the language model isn't trained here; valid: in stages.finetune")

    def to_dict(self) -> dict[str, Any]:
        """JSON form, without the launcher's file: how processes share a model doesn't change what they train."""
        recipe = self.recipe.to_dict()
        del recipe["accelerate_config"]
        return dataclasses.asdict(self) | {"recipe": recipe, "dualspeed": self.dualspeed.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "StageSettings":
        """Inverse of `to_dict`."""
        return read_dataclass(cls, data, "settings")


def pretrain_settings(project: ProjectConfig, experiment: Experiment) -> StageSettings:
    """Settings of the pretraining that `experiment` starts from: on full tokens if r = 1, else in fast mode only.

    What does not matter to it is set to the default, so that rows which share a pretraining ask for the same one.
    """
    config = dataclasses.replace(experiment.dualspeed, distillation_weight=0.0)
    if config.slow_mode_ratio == 1:
        default = DualSpeedConfig()
        config = dataclasses.replace(
            config, pruner=default.pruner, pruning_ratio=default.pruning_ratio, relevance_clip=None
        )
    else:
        config = dataclasses.replace(config, slow_mode_ratio=0.0)
    recipe = project.models[experiment.model].stages.pretrain
    return StageSettings(stage="pretrain", seed=experiment.seed, recipe=recipe, dualspeed=config)


def finetune_settings(project: ProjectConfig, experiment: Experiment) -> StageSettings:
    """Settings of the finetuning that makes `experiment`'s model."""
    recipe = project.models[experiment.model].stages.finetune
    return StageSettings(stage="finetune", seed=experiment.seed, recipe=recipe, dualspeed=experiment.dualspeed)


def pretrain_key(project: ProjectConfig, experiment: Experiment) -> str:
    """Folder name of the pretraining; rows with the same key share it."""
    settings = pretrain_settings(project, experiment)
    mode = "full" if settings.dualspeed.slow_mode_ratio == 1 else "fast"
    return f"{experiment.model}-{mode}-seed{experiment.seed}-{sha256_of_json(settings.to_dict())[:8]}"
