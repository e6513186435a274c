"""Mode of a training step: a pure function of (seed, step), so that every rank and every resume agrees."""

import math
import random
from enum import StrEnum


class Mode(StrEnum):
    """FAST trains on pruned visual tokens behind the mode isolator, SLOW on all of them."""

    FAST = "fast"
    SLOW = "slow"


def bernoulli_is_slow(seed: int, step: int, slow_mode_ratio: float) -> bool:
    """Independent draw per step, as in the paper. Seeding with a string hashes it (SHA-512), the same everywhere."""
    return random.Random(f"{seed}:{step}").random() < slow_mode_ratio


def stratified_is_slow(seed: int, step: int, slow_mode_ratio: float) -> bool:
    """Evenly spaced slow steps: their number after t steps is within one of t * r, for any r."""
    offset = random.Random(f"{seed}").random()
    return math.floor((step + 1) * slow_mode_ratio + offset) > math.floor(step * slow_mode_ratio + offset)


def counted_is_slow(seed: int, step: int, slow_steps: int, num_steps: int) -> bool:
    """Exactly `slow_steps` of `num_steps` steps, evenly spaced; whole numbers, so that no rounding can change it."""
    offset = random.Random(f"{seed}").randrange(num_steps)
    return ((step + 1) * slow_steps + offset) // num_steps > (step * slow_steps + offset) // num_steps


# name -> (seed, step, slow_mode_ratio) -> is this step slow?
MODE_SCHEDULES = {"bernoulli": bernoulli_is_slow, "stratified": stratified_is_slow}


def mode_of_step(seed: int, step: int, slow_mode_ratio: float, schedule: str = "bernoulli") -> Mode:
    """Mode of optimizer step `step` (from 0); all its micro-batches share it."""
    return Mode.SLOW if MODE_SCHEDULES[schedule](seed, step, slow_mode_ratio) else Mode.FAST
