"""Modules of a VLM by their role, and the part of the model that each parameter belongs to."""

from collections.abc import Iterable
from operator import attrgetter
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from dualspeed.method.vlm.families import family_of

CHOOSING = (".indexer.", "e_score_correction_bias")
"""Parts of names of parameters that choose experts, or keys to attend to, so that no gradient reaches them."""
Part = Literal["projector", "vision", "language", "unused"]


def vision_tower(vlm: PreTrainedModel) -> Any:
    """Vision tower, without the wrapper module that some classes have."""
    tower = attrgetter(family_of(vlm).tower)(vlm)
    return getattr(tower, "vision_model", tower)


def vision_layers(vlm: PreTrainedModel) -> nn.ModuleList:
    """Layers of the vision tower, for families that say where they are."""
    return attrgetter(family_of(vlm).layers)(vision_tower(vlm))


def projector(vlm: PreTrainedModel) -> nn.Module:
    """Module that the tower's features enter on their way to the language model."""
    return attrgetter(family_of(vlm).projector[0])(vlm)


def width_of_text(vlm: PreTrainedModel) -> int:
    """Width of the language model's embeddings."""
    return vlm.config.get_text_config().hidden_size


def feature_layers(vlm: PreTrainedModel) -> int | list[int]:
    """Selected hidden state or states of the tower, counted from the front; 0 is the output of the embeddings.

    The last one for models without `vision_feature_layer`.
    """
    config = vlm.config.vision_config
    # Before transformers 5.23 some name it `depth` alone.
    num_states = (config.num_hidden_layers if hasattr(config, "num_hidden_layers") else config.depth) + 1
    selected = getattr(vlm.config, "vision_feature_layer", -1)
    return selected % num_states if isinstance(selected, int) else [layer % num_states for layer in selected]


def last_feature_layer(vlm: PreTrainedModel) -> int:
    """Index of the last vision layer that the image features depend on."""
    selected = feature_layers(vlm)
    return (max(selected) if isinstance(selected, list) else selected) - 1


def language_parameters(vlm: PreTrainedModel) -> set[nn.Parameter]:
    """Parameters of the language model, its embeddings and its head."""
    modules = (vlm.get_decoder(), vlm.get_input_embeddings(), vlm.get_output_embeddings())
    return {parameter for module in modules if module is not None for parameter in module.parameters()}


def parameter_parts(vlm: PreTrainedModel) -> dict[nn.Parameter, Part]:
    """Part of each parameter of a VLM.

    `language`: language model, embeddings, head, and whatever is tied to them. `vision`: the tower. `unused`: parts of
    the tower that the image features never depend on. `projector`: everything between tower and language model.
    """
    family = family_of(vlm)
    tower = parameters_at(vlm, [family.tower, *family.further_towers])
    of_part: dict[Part, set[nn.Parameter]] = {
        "unused": parameters_at(vlm, family.ignored) | unused_tower_parameters(vlm) | named_with(vlm, CHOOSING),
        "language": language_parameters(vlm),
        "projector": parameters_at(vlm, family.projector),
        "vision": tower,
    }
    return {
        parameter: next((part for part, members in of_part.items() if parameter in members), "projector")
        for parameter in vlm.parameters()
    }


def named_with(vlm: PreTrainedModel, parts: tuple[str, ...]) -> set[nn.Parameter]:
    """Parameters whose names have one of these parts."""
    return {p for name, p in vlm.named_parameters() if any(part in name for part in parts)} if parts else set()


def unused_tower_parameters(vlm: PreTrainedModel) -> set[nn.Parameter]:
    """Parameters of the layers after the selected one, and of the tower's other modules that are never used."""
    family = family_of(vlm)
    unused = parameters_at(vision_tower(vlm), family.unused) if family.unused else set()
    if not family.layers or not hasattr(vlm.config, "vision_feature_layer"):
        return unused
    later = vision_layers(vlm)[last_feature_layer(vlm) + 1 :]
    return unused | {parameter for layer in later for parameter in layer.parameters()}


def parameters_at(root: nn.Module, paths: Iterable[str]) -> set[nn.Parameter]:
    """Parameters of the modules at these paths, and parameters that are at one themselves; absent paths have none."""
    found: set[nn.Parameter] = set()
    for path in filter(None, paths):
        try:
            value = attrgetter(path)(root)
        except AttributeError:
            continue
        if isinstance(value, nn.Parameter):
            found.add(value)
        elif isinstance(value, nn.Module):
            found.update(value.parameters())
    return found


def trainable_visual_parameters(vlm: PreTrainedModel) -> list[nn.Parameter]:
    """Trainable parameters outside the language model: projector, newline, vision tower."""
    language = language_parameters(vlm)
    return [parameter for parameter in vlm.parameters() if parameter.requires_grad and parameter not in language]


def conditional_parameters(vlm: PreTrainedModel) -> list[nn.Parameter]:
    """Trainable parameters that not every batch passes through."""
    conditional = named_with(vlm, family_of(vlm).conditional)
    chosen = named_with(vlm, CHOOSING) if conditional else set()
    return [parameter for parameter in conditional - chosen if parameter.requires_grad]
