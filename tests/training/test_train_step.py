"""Our steps have the gradients of plain ones (plain_step.py), with and without micro-batches and recomputation."""

import pytest
import torch
from torch.testing import assert_close

from measurements import train_step
from tests.support.step_size import SIZE


@pytest.fixture(scope="module")
def steps():
    models, steps = train_step.make_steps(SIZE, (*train_step.OURS, *train_step.PLAIN))
    return models["fast"], {name: step.args[0] for name, step in steps.items()}


def gradients(model, step) -> dict[str, torch.Tensor]:
    """Gradient of every trainable parameter; zeros if the step doesn't use it."""
    model.zero_grad()
    step()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in trained.items()}


@pytest.mark.parametrize("micro_batch_size", [3, 2, 1])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["baseline", "fast", "slow"])
def test_gradients_are_those_of_the_plain_step(steps, name, checkpointing, micro_batch_size):
    model, by_name = steps
    run = by_name[name]
    ours = gradients(model, lambda: run.func(*run.args[:2], micro_batch_size, checkpointing, **run.keywords))
    assert_close(ours, gradients(model, by_name[f"plain_{name}"]), atol=1e-5, rtol=1e-5)
