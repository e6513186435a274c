"""Losses: pure functions of logits and labels at supervised positions.

M supervised tokens, V vocabulary. Both losses are sums over the M tokens divided by `num_items`: the batch's own M or,
with gradient accumulation or several ranks, the number of supervised tokens of the whole step.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dualspeed.batch import IGNORE_INDEX
from dualspeed.pruners.selection import true_places

CHUNK = 1024
"""Number of tokens whose logits are in float32 at the same time."""


def supervised_positions(labels: Tensor) -> Tensor:
    """(B, L) bool mask of positions whose next token is supervised: their logits enter the loss."""
    next_is_supervised = torch.zeros_like(labels, dtype=torch.bool)
    next_is_supervised[:, :-1] = labels[:, 1:] != IGNORE_INDEX
    return next_is_supervised


def supervised_labels(labels: Tensor, count: int | None = None) -> Tensor:
    """(M,) labels of the supervised tokens, in the order of `supervised_positions`.

    Args:
        count: M; None: counted, which costs a host-device sync.
    """
    shifted = labels[:, 1:]
    is_supervised = shifted != IGNORE_INDEX
    return shifted[is_supervised] if count is None else shifted.flatten()[true_places(is_supervised, count)]


def cross_entropy(logits: Tensor, labels: Tensor, num_items: Tensor | int, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of (M, V) logits and (M,) labels, summed in float32 and divided by `num_items`.

    Args:
        smoothing: share of the target's probability that is spread over the whole vocabulary (label smoothing).
    """
    return sum_over_chunks(partial(_cross_entropy, smoothing), logits, labels) / num_items


def distillation(student_logits: Tensor, teacher_logits: Tensor, temperature: float, num_items: Tensor | int) -> Tensor:
    """T^2 KL(teacher || student) of (M, V) logits, summed and divided by `num_items` (paper section 3.3)."""
    divergence = sum_over_chunks(partial(_divergence, temperature), student_logits, teacher_logits)
    return temperature**2 * divergence / num_items


def sum_over_chunks(summed: Callable[[Tensor, Tensor], Tensor], logits: Tensor, targets: Tensor) -> Tensor:
    """Compute `summed(logits, targets)` in chunks of CHUNK tokens, recomputed in the backward pass.

    So a long sequence never holds (M, V) float32 probabilities beside its logits.
    """
    if len(logits) <= CHUNK:
        return summed(logits, targets)
    chunks = zip(logits.split(CHUNK), targets.split(CHUNK), strict=True)
    return torch.stack([checkpoint(summed, *chunk, use_reentrant=False) for chunk in chunks]).sum()


def _cross_entropy(smoothing: float, logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=smoothing)


def _divergence(temperature: float, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True)
