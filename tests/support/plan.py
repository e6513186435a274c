"""Kinds of training that the plan is tested on, models prepared for them, and the peak of memory that a run needs."""

import copy
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dualspeed import DualSpeedModel, Mode
from dualspeed.method.adapters import add_adapters
from dualspeed.plan.flops import Trained
from dualspeed.settings.recipe import LoraRecipe
from dualspeed.training.trainable import hold_trained_weights_in_float32, set_trainable

TRAININGS = {
    "pretrain": Trained(language=False),
    "finetune": Trained(language=True),
    "finetune with checkpointing": Trained(language=True, checkpointing=True),
    "finetune with vision": Trained(language=True, vision=True),
    "lora": Trained(language=True, lora_rank=16),
}


def stage_of(model: DualSpeedModel, trained: Trained) -> None:
    """Prepare a model for the stage that `trained` describes."""
    if trained.lora_rank:
        add_adapters(model.vlm, LoraRecipe(rank=trained.lora_rank, dropout=0.0))
    set_trainable(model, "finetune" if trained.language else "pretrain", with_vision=trained.vision)
    if trained.checkpointing:
        model.activation_checkpointing_enable()


def two_steps(template: DualSpeedModel, batch: dict[str, Any], mode: str) -> None:
    """Train a copy of a model for two steps as a stage does, with float32 weights, autocast and AdamW.

    Args:
        mode: baseline or fast.
    """
    model = copy.deepcopy(template)
    hold_trained_weights_in_float32(model)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch, mode=Mode.FAST if mode == "fast" else Mode.SLOW, distill=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def measured_peak(run) -> int:
    """Peak bytes allocated by `run`, from torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
