"""Losses in chunks: the same values and gradients, without probabilities of all tokens in float32."""

import pytest
import torch
from torch.nn import functional as F
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


def divide(monkeypatch, num_chunks: int) -> None:
    """Divide logits into this many chunks, however few they are."""
    monkeypatch.setattr(losses, "NUM_CHUNKS", num_chunks)
    monkeypatch.setattr(losses, "MANY_LOGITS", 0)


@pytest.mark.parametrize("num_chunks", [1, 3, 10])
def test_losses_and_gradients_are_those_of_plain_formulas(monkeypatch, num_chunks):
    divide(monkeypatch, num_chunks)
    found = both_losses(*logits_and_labels(torch.float32))
    student, teacher, labels = logits_and_labels(torch.float32)
    ce_loss = F.cross_entropy(student, labels, reduction="sum") / 4
    log_of, target = F.log_softmax(student / 2, dim=-1), F.log_softmax(teacher / 2, dim=-1)
    divergence = 2.0**2 * F.kl_div(log_of, target, reduction="sum", log_target=True) / 4
    (ce_loss + divergence).backward()
    assert_close(found, (ce_loss.detach(), divergence.detach(), student.grad), atol=1e-6, rtol=1e-6)


def test_chunks_keep_float32_to_themselves(monkeypatch):
    inputs = logits_and_labels(torch.bfloat16)
    with LargestFloat32() as whole:
        both_losses(*inputs)
    divide(monkeypatch, 5)
    inputs = logits_and_labels(torch.bfloat16)
    with LargestFloat32() as chunked:
        both_losses(*inputs)
    assert (whole.size, chunked.size) == (NUM_TOKENS * VOCABULARY, 2 * VOCABULARY)


def test_probabilities_are_not_kept_for_the_backward_pass():
    """Between the passes there is one gradient for each loss, in the logits' own precision."""
    student, teacher, labels = logits_and_labels(torch.bfloat16)
    ce_loss = losses.cross_entropy(student, labels, num_items=4)
    divergence = losses.distillation(student, teacher, temperature=2.0, num_items=4)
    nodes = nodes_behind((ce_loss + divergence).grad_fn)
    assert not [node for node in nodes if "Softmax" in node.name()]
    kept = [tensor for node in nodes for tensor in getattr(node, "saved_tensors", ())]
    assert [(tensor.dtype, tensor.shape) for tensor in kept] == [(torch.bfloat16, student.shape)] * 2


def test_gradients_in_bfloat16_are_rounded_once():
    """They equal those that autograd makes of the plain formulas in float32, division included, and then rounds."""
    student, teacher, labels = logits_and_labels(torch.bfloat16)
    log_of, target = (F.log_softmax(logits.float() / 1.7, dim=-1) for logits in (student, teacher))
    plain = {
        "cross-entropy": F.cross_entropy(student.float(), labels, reduction="sum") / 3,
        "distillation": 1.7**2 * F.kl_div(log_of, target, reduction="sum", log_target=True) / 3,
    }
    ours = {
        "cross-entropy": losses.cross_entropy(student, labels, num_items=3),
        "distillation": losses.distillation(student, teacher, temperature=1.7, num_items=3),
    }
    for name in plain:
        (expected,), (found,) = (torch.autograd.grad(loss[name], student) for loss in (plain, ours))
        assert found.dtype == torch.bfloat16
        assert_close(found, expected, atol=0, rtol=0)


def nodes_behind(node) -> list:
    """A node of autograd's graph, and all that its backward pass calls."""
    return [node, *(found for following, _ in node.next_functions if following for found in nodes_behind(following))]


def test_a_scaled_loss_in_float16_keeps_small_gradients():
    """As with a gradient scaler: what is 20 nats below the label has a probability that float16 rounds to zero."""
    logits = torch.tensor([[20.0, 2.0, 0.0]], dtype=torch.float16, requires_grad=True)
    (losses.cross_entropy(logits, torch.tensor([0]), num_items=1) * 2.0**16).backward()
    expected = 2.0**16 * logits.detach().float().softmax(dim=-1)[0, 1:]
    assert expected.min() / 2**16 < torch.finfo(torch.float16).smallest_normal * 2**-10
    assert_close(logits.grad[0, 1:].float(), expected, atol=0, rtol=1e-2)


def test_no_gradient_is_computed_for_logits_that_have_none(monkeypatch):
    """As in an evaluation."""
    student, teacher, labels = logits_and_labels(torch.float32)
    computed = []
    monkeypatch.setattr(torch.autograd, "grad", lambda value, leaf: computed.append(leaf) or (torch.zeros_like(leaf),))
    losses.cross_entropy(student, labels, num_items=4)
    assert len(computed) == 1
    assert not losses.cross_entropy(teacher, labels, num_items=4).requires_grad
    assert len(computed) == 1
