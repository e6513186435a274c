"""The two stages of training: which parameters each of them trains."""

from dualspeed.families import language_parameters
from dualspeed.modeling import DualSpeedModel

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


def set_trainable(model: DualSpeedModel, stage: str) -> None:
    """Pretraining trains projector and isolator, finetuning the language model as well; the vision tower is frozen.

    Where the language model carries adapters, they are trained in its stead.
    """
    language = language_parameters(model.vlm)
    for name, parameter in model.named_parameters():
        finetunes = ".lora_" in name if model.has_adapters else parameter in language
        parameter.requires_grad_(is_projector(name) or (stage == "finetune" and finetunes))
