"""Checkpoints of LLaVA and LLaVA-NeXT with the Hub's parameter names, which differ from those of transformers 5.

transformers saves a model with the names that it was loaded with. The base checkpoint is therefore written with the
Hub's names, and every later checkpoint keeps them.
"""

from pathlib import Path

from huggingface_hub import save_torch_state_dict
from transformers import PreTrainedModel, ProcessorMixin

from dualspeed.errors import BaseModelError
from dualspeed.files import atomic_folder

HUB_PREFIXES = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.image_newline": "image_newline",
}
"""Parameter prefixes of a fresh LLaVA in transformers 5 -> those of the checkpoints on the Hub."""


def hub_name(name: str) -> str:
    """Return the Hub's name of a parameter; BaseModelError for one that LLaVA doesn't have."""
    for prefix, hub_prefix in HUB_PREFIXES.items():
        if name.startswith(prefix):
            return hub_prefix + name.removeprefix(prefix)
    raise BaseModelError(f"{name}: no such parameter in a LLaVA checkpoint; valid prefixes: {', '.join(HUB_PREFIXES)}")


def save_with_hub_names(model: PreTrainedModel, processor: ProcessorMixin, out: Path) -> None:
    """Write model and processor to folder `out`, complete or not at all."""
    with atomic_folder(out) as folder:
        weights = {hub_name(name): tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_torch_state_dict(weights, folder, metadata={"format": "pt"})
        model.config.architectures = [type(model).__name__]
        model.config.dtype = model.dtype
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        processor.save_pretrained(folder)
