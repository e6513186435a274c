"""Losses in chunks: the same values and gradients, without probabilities of all tokens in float32."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from dualspeed.method import losses

NUM_TOKENS, VOCABULARY = 10, 7


class LargestFloat32(TorchDispatchMode):
    """Notes how many elements the largest float32 tensor has that is made inside."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.float32:
            self.size = max(self.size, made.numel())
        return made


def logits_and_labels(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A student's logits, a teacher's, and labels."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(NUM_TOKENS, VOCABULARY, generator=generator).to(dtype) for _ in range(2))
    return student.requires_grad_(), teacher, torch.randint(VOCABULARY, (NUM_TOKENS,), generator=generator)


def both_losses(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cross-entropy, divergence, and the gradient of their sum for the student's logits."""
    ce_loss = losses.cross_entropy(student, labels, num_items=4)
    divergence = losses.distillation(student, teacher, temperature=2.0, num_items=4)
    (ce_loss + divergence).backward()
    return ce_loss.detach(), divergence.detach(), student.grad


@pytest.mark.parametrize("chunk", [1, 3, 5])
def test_chunks_change_neither_losses_nor_gradients(monkeypatch, chunk):
    whole = both_losses(*logits_and_labels(torch.float32))
    monkeypatch.setattr(losses, "CHUNK", chunk)
    assert_close(both_losses(*logits_and_labels(torch.float32)), whole, atol=1e-6, rtol=1e-6)


def test_chunks_keep_float32_to_themselves(monkeypatch):
    inputs = logits_and_labels(torch.bfloat16)
    with LargestFloat32() as whole:
        both_losses(*inputs)
    monkeypatch.setattr(losses, "CHUNK", 2)
    inputs = logits_and_labels(torch.bfloat16)
    with LargestFloat32() as chunked:
        both_losses(*inputs)
    assert (whole.size, chunked.size) == (NUM_TOKENS * VOCABULARY, 2 * VOCABULARY)
