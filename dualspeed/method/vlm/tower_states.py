"""Outputs of a vision tower's layers: kept of one forward pass, and put in the place of the layers in later ones.

Of a frozen tower they are the same in every pass. Kept are those that something behind the layers reads; the embeddings
before them, and norms, mergers and projector behind them, run as ever, trained or not. So the same images give the same
features and the same gradients.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dualspeed.errors import ModelError
from dualspeed.method.vlm.encoder import accepted_inputs, image_encoder
from dualspeed.method.vlm.families import FAMILIES, family_of
from dualspeed.method.vlm.parts import feature_layers, vision_layers
from dualspeed.method.vlm.tower import capture_fields, has_cls_token, skip_unused_vision_layers

ATTENTION_FIELDS = ("cls_attention", "keys")
"""Fields of VisualTokens that are read inside a layer, so that they have to be kept with its output."""
IMAGES_OF_SAMPLE = "batch_num_images"
"""Input of towers that see an image otherwise where its sample has several."""
DROPOUT = ("drop", "dropout")
"""Parts of names of settings by which a tower draws at random, frozen or not."""


@dataclass(frozen=True)
class TowerStates:
    """Kept outputs for the images of a batch, in reading order."""

    fields: dict[str, Tensor]
    """(R, ...) by the names of `layer_name`, and ATTENTION_FIELDS; R tiles or patches of all images."""
    rows: list[int]
    """Rows of each image; they add up to R."""

    @classmethod
    def joined(cls, images: Sequence[dict[str, Tensor]]) -> "TowerStates":
        """Outputs for a batch of those of each image; without images, none."""
        names = images[0] if images else ()
        fields = {name: torch.cat([image[name] for image in images]) for name in names}
        return cls(fields, [len(next(iter(image.values()))) for image in images])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, images: slice) -> "TowerStates":
        before, rows = sum(self.rows[: images.start]), self.rows[images]
        places = slice(before, before + sum(rows))
        return TowerStates({name: values[places] for name, values in self.fields.items()}, rows)

    def __add__(self, other: "TowerStates") -> "TowerStates":
        fields = {name: torch.cat([values, other.fields[name]]) for name, values in self.fields.items()}
        return TowerStates(fields, self.rows + other.rows)

    def to(self, device: Any, non_blocking: bool = True) -> "TowerStates":
        """The same on a device, in its own dtypes."""
        moved = {name: values.to(device, non_blocking=non_blocking) for name, values in self.fields.items()}
        return TowerStates(moved, self.rows)

    def pin_memory(self) -> "TowerStates":
        """The same in memory that is copied to an accelerator without waiting."""
        return TowerStates({name: values.pin_memory() for name, values in self.fields.items()}, self.rows)


def layer_name(index: int) -> str:
    """Name of a layer's output."""
    return f"layer_{index}"


def read_layers(vlm: PreTrainedModel) -> list[int]:
    """Indices of the layers whose outputs something behind the layers reads: selected ones, and those of DeepStack."""
    selected = feature_layers(vlm)
    states = [selected] if isinstance(selected, int) else selected
    deeper = getattr(vlm.config.vision_config, "deepstack_visual_indexes", None) or []
    return sorted({state - 1 for state in states if state > 0} | set(deeper))


def attention_fields(vlm: PreTrainedModel, needs: Collection[str]) -> list[str]:
    """Fields to keep beside the outputs, for a pruner that needs these: keys if it reads them, and CLS attention.

    That one is kept for pruners of other trainings too where it costs next to nothing: one query of a CLS token.
    """
    return [name for name in ATTENTION_FIELDS if name in needs or (name == "cls_attention" and has_cls_token(vlm))]


def check_keepable(vlm: PreTrainedModel) -> None:
    """Raise ModelError for a tower whose outputs can't be kept image by image."""
    start, family = f"cache_features: {type(vlm).__name__}", family_of(vlm)
    if not (family.has_readable_tower and family.layers):
        others = [name for name, other in FAMILIES.items() if other.has_readable_tower and other.layers]
        raise ModelError(
            f"{start} has a tower whose outputs can't be told apart by image; valid: null, or a model of "
            f"{', '.join(others)}"
        )
    if IMAGES_OF_SAMPLE in accepted_inputs(vlm):
        raise ModelError(
            f"{start} cuts an image into tiles only where its sample has no other, so that an image has no features of "
            "its own; valid: null"
        )
    settings = vlm.config.vision_config.to_dict().items()
    random = [name for name, value in settings if any(part in name for part in DROPOUT) and value]
    if random:
        raise ModelError(
            f"{start} draws at random in its tower ({random[0]} in its vision_config), so that no two passes are "
            "alike; valid: null, or a model without"
        )


def states_of_images(vlm: PreTrainedModel, images: dict[str, Tensor], fields: Collection[str]) -> dict[str, Tensor]:
    """Run the tower on images and return what is to be kept, by the names of TowerStates.

    Args:
        images: inputs of the model's `get_image_features`.
        fields: ATTENTION_FIELDS to keep, as from `attention_fields`.
    """
    kept: dict[str, Tensor] = {}
    layers = vision_layers(vlm)
    with ExitStack() as hooks, torch.no_grad():
        for index in read_layers(vlm):

            def keep(layer: nn.Module, args: tuple, output: Tensor, name: str = layer_name(index)) -> None:
                kept[name] = output

            hooks.callback(layers[index].register_forward_hook(keep).remove)
        arguments = hooks.enter_context(skip_unused_vision_layers(vlm))
        hooks.enter_context(capture_fields(vlm, fields, kept))
        image_encoder(vlm)(**images, **arguments, return_dict=True)
    return kept


@contextmanager
def states_in_place(vlm: PreTrainedModel, states: TowerStates | None) -> Iterator[None]:
    """Let the tower's layers return kept outputs while the context is open; None: they run.

    Without images all pass on their input: the features of a blank image, which enter a loss times 0.
    """
    if states is None:
        yield
        return
    layers = list(vision_layers(vlm))
    own = [vars(layer).get("forward") for layer in layers]  # of accelerate's hooks, say
    try:
        for index, layer in enumerate(layers):
            layer.forward = partial(kept_output, states.fields.get(layer_name(index)))
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def kept_output(state: Tensor | None, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Output of a layer that isn't run: the kept one, or its input where none was kept."""
    if state is None:
        return hidden_states
    if state.shape != hidden_states.shape:
        raise ModelError(
            f"cache_features: the kept outputs of a batch are {tuple(state.shape)}, and its images become "
            f"{tuple(hidden_states.shape)}; valid: an image processor that treats each image by itself"
        )
    return state
