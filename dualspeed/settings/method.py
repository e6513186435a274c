"""Settings of the method (paper section 3)."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from dualspeed.settings.model import PRUNE_BUDGETS
from dualspeed.settings.modes import MODE_SCHEDULES
from dualspeed.settings.names import PRUNER_NAMES
from dualspeed.settings.reading import check_choice, check_range


@dataclass(frozen=True, kw_only=True)
class DualSpeedConfig:
    """The method's settings (paper section 3; defaults are the paper's)."""

    pruner: str = "divprune"
    """Visual token pruning method of fast mode."""
    pruning_ratio: float = 0.9
    """Share p of an image's visual tokens that fast mode drops, in [0, 1)."""
    slow_mode_ratio: float = 0.1
    """Share r of the steps that run in slow mode: 1 is ordinary training, 0 is pruning alone."""
    num_virtual_tokens: int = 4
    """Length l of the mode isolator; 0 means none."""
    distillation_weight: float = 1.0
    """Weight alpha of the self-distillation loss of slow mode; 0 runs no teacher."""
    distillation_temperature: float = 1.0
    """Softmax temperature T of teacher and student."""
    mode_schedule: str = "bernoulli"
    """`bernoulli` draws each step (the paper), `stratified` spaces slow steps evenly."""
    prune_budget: str = "image"
    """What p is a share of: an `image`'s packed tokens, or those of each any-resolution `tile`."""
    relevance_clip: str | None = None
    """Folder of the CLIP whose text tower tells cdpruner what matters to the user's text; None: the language model."""

    def __post_init__(self) -> None:
        check_choice("pruner", self.pruner, PRUNER_NAMES)
        check_choice("mode_schedule", self.mode_schedule, tuple(MODE_SCHEDULES))
        check_choice("prune_budget", self.prune_budget, PRUNE_BUDGETS)
        check_range("pruning_ratio", self.pruning_ratio, 0 <= self.pruning_ratio < 1, "in [0, 1)")
        check_range("slow_mode_ratio", self.slow_mode_ratio, 0 <= self.slow_mode_ratio <= 1, "in [0, 1]")
        check_range("num_virtual_tokens", self.num_virtual_tokens, self.num_virtual_tokens >= 0, "0 or more")
        check_range("distillation_weight", self.distillation_weight, self.distillation_weight >= 0, "0 or more")
        temperature = self.distillation_temperature
        check_range("distillation_temperature", temperature, temperature > 0, "above 0")

    def to_dict(self) -> dict[str, Any]:
        """JSON form, without a CLIP where none is asked: what was trained before there was that choice stays."""
        settings = dataclasses.asdict(self)
        if self.relevance_clip is None:
            del settings["relevance_clip"]
        return settings
