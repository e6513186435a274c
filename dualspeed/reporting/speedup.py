"""Speedup of a training step over a Baseline's: as measured, and the limit that FLOPs set."""

from collections.abc import Mapping


def speedup_measured(times: Mapping[str, float], slow_mode_ratio: float) -> float:
    """Speedup from the median seconds of a fast, a slow and a Baseline step; a share `slow_mode_ratio` is slow."""
    mean_step = (1 - slow_mode_ratio) * times["fast_step_seconds"] + slow_mode_ratio * times["slow_step_seconds"]
    return times["baseline_step_seconds"] / mean_step


def speedup_theory(fast_share: float, slow_mode_ratio: float, distillation_weight: float) -> float:
    """Limit of the speedup, if time went by FLOPs alone.

    A fast step costs the share `fast_share` of a Baseline step. A slow step costs one Baseline step, and with
    distillation the teacher's forward pass on pruned tokens: a third of a fast step, since it has no backward pass.
    """
    slow = 1 + fast_share / 3 if distillation_weight > 0 else 1.0
    return 1 / ((1 - slow_mode_ratio) * fast_share + slow_mode_ratio * slow)
