"""The two stages of training: which parameters each of them trains."""

import torch
from torch import nn
from transformers import PreTrainedModel

from dualspeed.method.model import DualSpeedModel
from dualspeed.method.vlm.families import language_parameters
from dualspeed.method.vlm.tower import selected_vision_layer, vision_encoder

# Modules that translate between vision and language, by the names that VLMs give them; trained in both stages, as is
# the isolator.
PROJECTOR_MODULES = (
    "mode_isolator",
    "multi_modal_projector",
    "image_newline",
    ".connector.",
    ".visual.merger.",
    ".visual.deepstack_merger_list.",
)


def is_projector(name: str) -> bool:
    """Whether a parameter of a DualSpeedModel belongs to projector or isolator."""
    return any(module in name for module in PROJECTOR_MODULES)


def set_trainable(model: DualSpeedModel, stage: str, with_vision: bool = False) -> None:
    """Pretraining trains projector and isolator, finetuning the language model as well.

    Where the language model carries adapters, they are trained in its stead.

    Args:
        with_vision: whether the vision tower is trained too, up to the layer that its features come from.
    """
    language, vision = language_parameters(model.vlm), vision_parameters(model.vlm) if with_vision else set()
    for name, parameter in model.named_parameters():
        finetunes = ".lora_" in name if model.has_adapters else parameter in language
        parameter.requires_grad_(is_projector(name) or (stage == "finetune" and finetunes) or parameter in vision)


def vision_parameters(vlm: PreTrainedModel) -> set[nn.Parameter]:
    """Parameters of the vision tower that reach the features; later layers never run (dualspeed.method.vlm.tower)."""
    tower = vlm.model.vision_tower
    unused = [*vision_encoder(vlm).layers[selected_vision_layer(vlm) + 1 :], getattr(tower, "post_layernorm", None)]
    idle = {parameter for module in unused if module is not None for parameter in module.parameters()}
    return set(tower.parameters()) - idle


def is_vision(name: str) -> bool:
    """Whether a parameter of a DualSpeedModel belongs to the vision tower."""
    return ".vision_tower." in name


def hold_trained_weights_in_float32(model: DualSpeedModel) -> None:
    """Give trained weights of fewer bits the float32 that small updates need; frozen ones stay as they are."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
