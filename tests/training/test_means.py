"""Optimisations that measurements/means.py switches on and off change no gradient; packed equals padded."""

import pytest
import torch
from torch.testing import assert_close

from measurements import means
from tests.support.step_size import SIZE

# Compiling takes a minute, and bfloat16 rounds: neither is in use.
EXACT = [name for name in means.OPTIMISATIONS if "compile" not in name and "bfloat16" not in name]


@pytest.mark.parametrize("name", EXACT)
def test_a_means_leaves_gradients_as_they_were(monkeypatch, name):
    gradients = []

    def gradients_of(run, optimizer, parameters) -> None:
        optimizer.zero_grad()
        run()
        gradients.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters])

    monkeypatch.setattr(means, "SIZE", SIZE)
    monkeypatch.setattr(means, "optimised", gradients_of)
    for step in means.both_ways(name).values():
        step()
    with_it, without_it = gradients
    assert any(gradient.abs().max() > 0 for gradient in with_it)
    assert_close(with_it, without_it, atol=1e-5, rtol=1e-5)


def test_fast_steps_are_recomputed_where_the_measurement_says_so(monkeypatch):
    """Each layer runs once more in the backward pass."""
    monkeypatch.setattr(means, "SIZE", SIZE)
    models, steps = means.make_steps(SIZE, ("fast",))
    calls = []
    for layer in models["fast"].vlm.get_decoder().layers:
        layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    steps["fast"]()
    num_calls = len(calls)
    with means.recomputed_in_fast_steps(models["fast"]):
        steps["fast"]()
    assert len(calls) == 3 * num_calls
    steps["fast"]()
    assert len(calls) == 4 * num_calls
