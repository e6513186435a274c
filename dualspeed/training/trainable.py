"""Parts of a model, and the parts that each stage of training trains."""

import torch

from dualspeed.method.model import DualSpeedModel
from dualspeed.method.vlm.parts import CHOOSING, Part, language_parameters, named_with, parameter_parts


def parts_of(model: DualSpeedModel) -> dict[str, Part]:
    """Part of each parameter, by name; the isolator belongs to the projector.

    An `unused` parameter is one that image features never depend on, such as those of vision layers after the selected
    one: it has no gradient and is never trained.
    """
    parts = parameter_parts(model.vlm)
    return {name: parts.get(parameter, "projector") for name, parameter in model.named_parameters()}


def set_trainable(model: DualSpeedModel, stage: str, with_vision: bool = False) -> None:
    """Make the parameters of a stage trainable: projector and isolator, in finetuning the language model as well.

    If the language model carries adapters, they are trained instead of it.

    Args:
        stage: `pretrain` or `finetune`.
        with_vision: True trains the vision tower too.
    """
    parts = parts_of(model)
    trained: set[Part] = {"projector"}
    if stage == "finetune":
        trained.add("language")
    if with_vision:
        trained.add("vision")
    for name, parameter in model.named_parameters():
        is_replaced = model.has_adapters and parts[name] == "language" and ".lora_" not in name
        parameter.requires_grad_(parts[name] in trained and not is_replaced)


def freeze_untrained(model: DualSpeedModel, is_stock: bool = False, trains_vision: bool = False) -> None:
    """Freeze the parameters that get no gradient in any step; of a stock model also the vision tower.

    Args:
        is_stock: True if the model came as a stock one, of which nobody chose the trainable parameters.
        trains_vision: True makes the tower of a stock model trainable instead. Its adapters stay as they are.
    """
    parts = parts_of(model)
    for name, parameter in model.named_parameters():
        if parts[name] == "unused":
            parameter.requires_grad_(False)
        elif is_stock and parts[name] == "vision" and ".lora_" not in name and parameter.is_floating_point():
            parameter.requires_grad_(trains_vision)


def hold_trained_weights_in_float32(model: DualSpeedModel) -> None:
    """Convert trainable 16-bit weights to float32, which small updates need; frozen weights keep their dtype.

    Those that choose experts or keys inside a language model that is trained whole are converted with it: its hidden
    states become float32.
    """
    language = language_parameters(model.vlm)
    is_whole = not model.has_adapters and any(parameter.requires_grad for parameter in language)
    choosing = named_with(model.vlm, CHOOSING) if is_whole else set()
    for parameter in model.parameters():
        if (parameter.requires_grad or parameter in choosing) and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
