"""Settings of the method (paper section 3)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dualspeed.errors import ConfigError
from dualspeed.settings.fields import check_fields, choice, number
from dualspeed.settings.model import PRUNE_BUDGETS
from dualspeed.settings.modes import MODE_SCHEDULES, Mode, counted_is_slow, mode_of_step
from dualspeed.settings.names import PRUNER_NAMES


def check_slow_steps(given: Mapping[str, Any]) -> None:
    """Raise ConfigError if someone wrote both a number and a share of slow steps, the share's default included."""
    count, share = given.get("slow_steps"), given.get("slow_mode_ratio")
    if count is not None and share is not None:
        raise ConfigError(f"slow_steps: {count!r} beside slow_mode_ratio {share!r}; valid: one of the two")


@dataclass(frozen=True, kw_only=True)
class DualSpeedConfig:
    """The method's settings (paper section 3; defaults are the paper's)."""

    pruner: str = choice(PRUNER_NAMES, default="divprune")
    """Visual token pruning method of fast mode."""
    pruning_ratio: float = number(minimum=0, below=1, default=0.9)
    """Share p of an image's visual tokens that fast mode drops, in [0, 1)."""
    slow_mode_ratio: float = number(minimum=0, maximum=1, default=0.1)
    """Share r of the steps that run in slow mode: 1 is ordinary training, 0 is pruning alone."""
    slow_steps: int | None = number(minimum=1, default=None)
    """Number N of slow steps in the whole training, evenly spaced, instead of the share r; None: r decides."""
    num_virtual_tokens: int = number(minimum=0, default=4)
    """Length l of the mode isolator; 0 means none."""
    distillation_weight: float = number(minimum=0, default=1.0)
    """Weight alpha of the self-distillation loss of slow mode; 0 runs no teacher."""
    distillation_temperature: float = number(above=0, default=1.0)
    """Softmax temperature T of teacher and student."""
    mode_schedule: str = choice(MODE_SCHEDULES, default="bernoulli")
    """`bernoulli` draws each step (the paper), `stratified` spaces slow steps evenly."""
    prune_budget: str = choice(PRUNE_BUDGETS, default="image")
    """Unit that p is a share of: an `image`'s packed tokens, or each any-resolution `tile`'s."""
    relevance_clip: str | None = None
    """Folder of the CLIP whose text tower tells pruners what matters to the user's text; None: the language model."""

    pixel_pruning: float | None = number(minimum=0, default=None)
    """Tolerance of PixelPrune, which keeps squares of predictable pixels out of a Qwen-VL's tower; None: all enter."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.slow_steps is None:
            return
        if self.slow_mode_ratio != type(self).slow_mode_ratio:
            check_slow_steps({"slow_steps": self.slow_steps, "slow_mode_ratio": self.slow_mode_ratio})
        if self.mode_schedule != type(self).mode_schedule:
            raise ConfigError(f"mode_schedule: {self.mode_schedule!r} has no effect with slow_steps; valid: without it")

    def mode_of_step(self, seed: int, step: int, num_steps: int) -> Mode:
        """Mode of optimizer step `step` (from 0) of `num_steps`; all its micro-batches share it.

        Raises:
            ConfigError: as `slow_share`.
        """
        if self.slow_steps is None:
            return mode_of_step(seed, step, self.slow_mode_ratio, self.mode_schedule)
        self.slow_share(num_steps)
        return Mode.SLOW if counted_is_slow(seed, step, self.slow_steps, num_steps) else Mode.FAST

    def slow_share(self, num_steps: float) -> float:
        """Share of slow steps in a training of `num_steps` steps.

        Raises:
            ConfigError: there are fewer steps than `slow_steps`.
        """
        if self.slow_steps is None:
            return self.slow_mode_ratio
        if self.slow_steps > num_steps:
            raise ConfigError(
                f"slow_steps: {self.slow_steps} of {num_steps:g} steps; valid: at most the training's steps"
            )
        return self.slow_steps / num_steps
