"""Our steps have the gradients of plain ones (plain_step.py), with and without micro-batches and recomputation.

Steps with PixelPrune leave out of the tower what they should.
"""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from dualspeed.training.step_times import count_flops
from measurements import train_step
from measurements.models import MODELS
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


def test_steps_of_a_qwen_leave_half_of_the_squares_out():
    """Counted, not timed: fewer FLOPs in the tower, and in the whole fast step; the teacher's tower runs once more."""
    tiny_text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tiny_text |= {"num_key_value_heads": 2, "head_dim": 8}
    tiny_text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    tiny_vision = {"hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 4, "out_hidden_size": 32}
    tiny_vision |= {"deepstack_visual_indexes": [0]}
    size = dataclasses.replace(
        MODELS["small-qwen3-vl"], text=tiny_text, vision=tiny_vision, batch_size=2, grid=4, vocabulary=50
    )
    names = train_step.steps_of(size)
    assert not set(train_step.PLAIN) & set(names)
    _, steps = train_step.make_steps(size, names)
    flops = {name: count_flops(step) for name, step in steps.items()}
    tower = {name: train_step.in_tower(steps[name], 1)["flops"] for name in ("fast", "pixels_fast", "pixels_slow")}
    assert tower["pixels_fast"] < 0.6 * tower["fast"]
    assert tower["pixels_slow"] == tower["fast"] + tower["pixels_fast"]
    # What leaves the tower leaves the step, the projector's backward pass and the pruner's work with it.
    assert flops["fast"] - flops["pixels_fast"] >= tower["fast"] - tower["pixels_fast"]
