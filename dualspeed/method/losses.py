"""Losses: pure functions of logits and labels at supervised positions.

M supervised tokens, V vocabulary. Both losses are sums over the M tokens divided by `num_items`: the batch's own M or,
with gradient accumulation or several ranks, the number of supervised tokens of the whole step.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dualspeed.batch import IGNORE_INDEX
from dualspeed.pruners.selection import true_places

NUM_CHUNKS = 8
"""Number of parts of the logits. One part at a time is in float32, with its probabilities."""
MANY_LOGITS = 2**20
"""Fewer logits than this stay in one part."""


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
    return sum_over_chunks(partial(_cross_entropy, smoothing, num_items), logits, labels)


def distillation(student_logits: Tensor, teacher_logits: Tensor, temperature: float, num_items: Tensor | int) -> Tensor:
    """T^2 KL(teacher || student) of (M, V) logits, summed and divided by `num_items` (paper section 3.3)."""
    return sum_over_chunks(partial(_divergence, temperature, num_items), student_logits, teacher_logits)


def sum_over_chunks(summed: Callable[[Tensor, Tensor], Tensor], logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of `summed(chunk of float32 logits, chunk of targets)` over the chunks of (M, V) logits, with its gradient.

    Each chunk's gradient is computed together with its value, so that probabilities of one chunk alone are in memory,
    not of all tokens until the backward pass.
    """
    total: Tensor = _SumOverChunks.apply(summed, logits, targets)
    return total


def split_logits(logits: Tensor) -> tuple[Tensor, ...]:
    """NUM_CHUNKS parts of (M, V) logits along the tokens; a single part if there are fewer than MANY_LOGITS."""
    return logits.split(max(len(logits), 1) if logits.numel() < MANY_LOGITS else -(-len(logits) // NUM_CHUNKS))


class _SumOverChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, summed: Callable[[Tensor, Tensor], Tensor], logits: Tensor, targets: Tensor) -> Tensor:
        total = logits.new_zeros((), dtype=torch.float32)
        # It is multiplied by the scale of the loss later, too late for values that float16 has rounded to zero.
        dtype = torch.float32 if logits.dtype is torch.float16 else logits.dtype
        gradient = torch.empty_like(logits, dtype=dtype) if ctx.needs_input_grad[1] else None
        start = 0
        for chunk in split_logits(logits):
            rows = slice(start, start := start + len(chunk))
            with torch.set_grad_enabled(gradient is not None):
                leaf = chunk.detach().float().requires_grad_(gradient is not None)
                value = summed(leaf, targets[rows])
            if gradient is not None:
                gradient[rows] = torch.autograd.grad(value, leaf)[0]
            total += value.detach()
        ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor | None, None]:
        (gradient,) = ctx.saved_tensors
        return None, None if gradient is None else (gradient * upstream).to(ctx.dtype), None


# T^2 and the division are inside, where the gradient is in float32. Outside, they would round it a second time.


def _cross_entropy(smoothing: float, num_items: Tensor | int, logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing) / num_items


def _divergence(temperature: float, num_items: Tensor | int, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    student = F.log_softmax(student_logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="sum", log_target=True) / num_items
