"""How image features enter a stock model: the output of its image encoder, with other features, or embeddings."""

from dataclasses import MISSING, fields
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from dualspeed.method.vlm.families import family_of
from dualspeed.method.vlm.family import Family


def all_features(family: Family, output: ModelOutput) -> list[Tensor]:
    """Features of deeper layers (DeepStack) of an encoder's output, (P, D) each."""
    deepstack = getattr(output, "deepstack_features", None) or []
    layers = [features for _, features in deepstack] if family.has_layered_features else deepstack
    return [torch.cat(list(layer)) for layer in layers]


def with_features(
    family: Family, output: ModelOutput, features: list[Tensor], positions: list[Tensor], num_virtual_tokens: int
) -> ModelOutput:
    """Copy of an encoder's output with other features, in the form that the model returns them in.

    Args:
        features: (l + K_u, D) isolator and kept features of each unit.
        positions: (K_u,) positions of the kept features among the P tokens.
        num_virtual_tokens: length l of the isolator.
    """
    # Deeper layers add these to the image tokens, and zeros to the isolator.
    deeper = [
        [F.pad(layer[kept], (0, 0, num_virtual_tokens, 0)) for kept in positions]
        for layer in all_features(family, output)
    ]
    if family.has_layered_features:
        layers = [layer for layer, _ in output["deepstack_features"]]
        return type(output)(deepstack_features=list(zip(layers, [features, *deeper[1:]], strict=True)))
    before = getattr(output, family.features)
    changed: dict[str, Any] = {family.features: features}
    if isinstance(before, Tensor):
        joined = torch.cat(features)
        changed[family.features] = joined[None] if before.dim() == 3 else joined
    changed |= {name: getattr(output, name) for name in family.carried}
    if deeper:
        changed["deepstack_features"] = deeper
    # Some classes demand hidden states, which no forward reads.
    demanded = {field.name: None for field in fields(output) if field.default is MISSING}
    return type(output)(**demanded | changed)


def projected(family: Family, features: list[Tensor]) -> ModelOutput:
    """Output of an encoder that leaves out the projector, with the projected features instead."""
    return BaseModelOutputWithPooling(**{family.features: torch.stack(features)})


def runner(vlm: PreTrainedModel) -> PreTrainedModel:
    """Model whose forward and `generate` take `inputs_of_forward`."""
    path = family_of(vlm).runs
    return attrgetter(path)(vlm) if path else vlm


def inputs_of_forward(vlm: PreTrainedModel, input_ids: Tensor, images: ModelOutput | None) -> dict[str, Any]:
    """Arguments of `runner` through which tokens and image features enter.

    Args:
        images: as from `get_image_features` or `with_features`; None: no image.
    """
    if not family_of(vlm).enters_as_embeddings:
        return {"input_ids": input_ids, "mm_encoder_outputs": {} if images is None else {"image": images}}
    embeddings = vlm.get_input_embeddings()(input_ids)
    if images is not None:
        features = torch.cat(list(images[family_of(vlm).features])).to(embeddings)
        is_image = (input_ids == vlm.config.image_token_id)[..., None].expand_as(embeddings)
        embeddings = embeddings.masked_scatter(is_image, features)
    return {"inputs_embeds": embeddings}
