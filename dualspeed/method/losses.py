"""The losses: pure functions of logits and labels at supervised positions.

M supervised tokens, V vocabulary. Both losses are sums over the M tokens divided by `num_items`: the batch's own M, or,
under gradient accumulation and several ranks, the number of supervised tokens in the whole step.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dualspeed.batch import IGNORE_INDEX

CHUNK = 1024
"""Tokens whose logits are in float32 at once."""


def supervised_positions(labels: Tensor) -> Tensor:
    """(B, L) bool: positions whose next token is supervised, that is, whose logits enter the loss."""
    next_is_supervised = torch.zeros_like(labels, dtype=torch.bool)
    next_is_supervised[:, :-1] = labels[:, 1:] != IGNORE_INDEX
    return next_is_supervised


def supervised_labels(labels: Tensor) -> Tensor:
    """(M,) the supervised tokens in the order of `supervised_positions`."""
    shifted = labels[:, 1:]
    return shifted[shifted != IGNORE_INDEX]


def cross_entropy(logits: Tensor, labels: Tensor, num_items: Tensor | int) -> Tensor:
    """Sum over (M, V) logits and (M,) labels of the cross-entropy, in float32, over `num_items`."""
    return sum_over_chunks(_cross_entropy, logits, labels) / num_items


def distillation(student_logits: Tensor, teacher_logits: Tensor, temperature: float, num_items: Tensor | int) -> Tensor:
    """T^2 KL(teacher || student) over (M, V) logits, summed, over `num_items` (paper section 3.3)."""
    divergence = sum_over_chunks(partial(_divergence, temperature), student_logits, teacher_logits)
    return temperature**2 * divergence / num_items


def sum_over_chunks(summed: Callable[[Tensor, Tensor], Tensor], logits: Tensor, targets: Tensor) -> Tensor:
    """`summed(logits, targets)`, CHUNK tokens at a time, whose float32 copies are made anew in the backward pass.

    So that a long sequence never has (M, V) probabilities in float32 beside its logits.
    """
    if len(logits) <= CHUNK:
        return summed(logits, targets)
    chunks = zip(logits.split(CHUNK), targets.split(CHUNK), strict=True)
    return torch.stack([checkpoint(summed, *chunk, use_reentrant=False) for chunk in chunks]).sum()


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def _divergence(temperature: float, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True)
