"""Settings of the method (paper section 3)."""

from dataclasses import dataclass

from dualspeed.settings.fields import check_fields, choice, number
from dualspeed.settings.model import PRUNE_BUDGETS
from dualspeed.settings.modes import MODE_SCHEDULES
from dualspeed.settings.names import PRUNER_NAMES


@dataclass(frozen=True, kw_only=True)
class DualSpeedConfig:
    """The method's settings (paper section 3; defaults are the paper's)."""

    pruner: str = choice(PRUNER_NAMES, default="divprune")
    """Visual token pruning method of fast mode."""
    pruning_ratio: float = number(minimum=0, below=1, default=0.9)
    """Share p of an image's visual tokens that fast mode drops, in [0, 1)."""
    slow_mode_ratio: float = number(minimum=0, maximum=1, default=0.1)
    """Share r of the steps that run in slow mode: 1 is ordinary training, 0 is pruning alone."""
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
