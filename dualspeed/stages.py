"""The two stages of training: which parameters each of them trains."""

from dualspeed.modeling import DualSpeedModel

# Modules of the VLMs that translate between vision and language; trained in both stages, as is the isolator.
PROJECTOR_MODULES = ("mode_isolator", "multi_modal_projector", "image_newline")


def is_projector(name: str) -> bool:
    """Whether a parameter of a DualSpeedModel belongs to projector or isolator."""
    return any(module in name for module in PROJECTOR_MODULES)


def set_trainable(model: DualSpeedModel, stage: str) -> None:
    """Pretraining trains projector and isolator, finetuning the language model as well; the vision tower is frozen."""
    for name, parameter in model.named_parameters():
        is_language = name.startswith(("vlm.model.language_model.", "vlm.lm_head."))
        parameter.requires_grad_(is_projector(name) or (stage == "finetune" and is_language))
