"""Kinds of training that the plan is tested on, models prepared for them, and the peak of memory that a run needs."""

from torch.profiler import ProfilerActivity, profile

from dualspeed import DualSpeedModel
from dualspeed.method.adapters import add_adapters
from dualspeed.plan.flops import Trained
from dualspeed.settings.recipe import LoraRecipe
from dualspeed.training.trainable import set_trainable

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
