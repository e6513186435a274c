"""Settings of a measurement of step times; rows with the same settings share one."""

import dataclasses
from dataclasses import dataclass

from dualspeed.settings.identity import key_of
from dualspeed.settings.method import DualSpeedConfig
from dualspeed.settings.model import ModelConfig

REPEATS = 15
"""Steps of each mode that a measurement takes the median of."""
THREADS = 1
"""CPU threads of a measurement, as the training rules have: more serve long sequences better than short ones."""


@dataclass(frozen=True, kw_only=True)
class SpeedSettings:
    """Everything that a measurement of step times depends on, but model and data."""

    dualspeed: DualSpeedConfig
    """Settings of the method."""
    chat_template: str
    """Prompt format of the batch."""
    batch_size: int
    """Samples of the batch."""
    repeats: int = REPEATS
    """Steps of each mode."""
    threads: int = THREADS
    """CPU threads."""


def speed_settings(model: ModelConfig, dualspeed: DualSpeedConfig) -> SpeedSettings:
    """Settings of the measurement of a row's step times.

    r enters a speedup by arithmetic on the times of a fast and a slow step, and alpha only decides whether a teacher
    runs; so rows that differ in nothing else share a measurement.
    """
    recipe = model.stages.finetune
    weight = 1.0 if dualspeed.distillation_weight else 0.0
    ratio = DualSpeedConfig().slow_mode_ratio
    return SpeedSettings(
        dualspeed=dataclasses.replace(dualspeed, slow_mode_ratio=ratio, distillation_weight=weight),
        chat_template=recipe.chat_template,
        batch_size=recipe.per_device_batch_size or recipe.global_batch_size,
    )


def speed_key(name: str, model: ModelConfig, dualspeed: DualSpeedConfig) -> str:
    """File name of the measurement of the steps of the model `name` by this method."""
    teacher = "distilled" if dualspeed.distillation_weight else "plain"
    method = f"{dualspeed.pruner}-p{dualspeed.pruning_ratio:g}-l{dualspeed.num_virtual_tokens}-{teacher}"
    return f"{name}-{method}-{key_of(speed_settings(model, dualspeed))}"
