"""Inputs of a batch, sorted by who takes them: the vision tower, or the language model token by token."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from dualspeed.batch import TOKEN_INPUTS
from dualspeed.errors import UnknownInputError
from dualspeed.method.host_counts import HOST_INPUTS
from dualspeed.method.vlm.encoder import accepted_inputs
from dualspeed.method.vlm.families import family_of
from dualspeed.method.vlm.parts import projector, width_of_text
from dualspeed.method.vlm.positions import positions_3d
from dualspeed.pruners.selection import true_places

WITHOUT_ROWS = {"target_sizes", "image_token_pooling", "image_grid_hw"}
"""Inputs that come with `pixel_values` whose rows aren't those of one image after the other."""


def image_inputs(vlm: PreTrainedModel, inputs: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Inputs that the vision tower takes; UnknownInputError names those that neither it nor the text takes."""
    accepted = [name for name in accepted_inputs(vlm) if name not in family_of(vlm).refused_inputs]
    unknown = [
        name for name in inputs if name not in accepted and name not in TOKEN_INPUTS and inputs[name] is not None
    ]
    if unknown:
        raise UnknownInputError(
            f"{type(vlm).__name__}: unknown input {', '.join(unknown)}; images take {', '.join(accepted)}"
        )
    return {name: values for name, values in inputs.items() if name in accepted and values is not None}


def blank_image(vlm: PreTrainedModel) -> dict[str, Tensor]:
    """One blank image as the model's `get_image_features` takes it, on the model's device and in its dtype."""
    return {
        name: values
        if name in HOST_INPUTS
        else values.to(vlm.device, vlm.dtype if values.is_floating_point() else None, non_blocking=True)
        for name, values in family_of(vlm).blank_image(vlm).items()
    }


def image_units(vlm: PreTrainedModel, output: ModelOutput) -> list[Tensor]:
    """(N_i, D) visual tokens of each image, or of each tile where the model returns all tiles of a sample at once.

    Args:
        output: result of `get_image_features`, images in reading order.
    """
    family = family_of(vlm)
    if family.has_layered_features:
        return list(output.deepstack_features[0][1])
    features = getattr(output, family.features)
    if family.projects_later:
        features = projector(vlm)(features.flatten(0, 1)).view(len(features), -1, width_of_text(vlm))
    if not family.splits_samples_into_tiles:
        return list(features)
    # A tile has a fixed number of tokens.
    num_tokens = family.tokens_of_tile(vlm)
    return [tile for sample in features for tile in sample.split(num_tokens) if len(tile)]


def image_seeds(vlm: PreTrainedModel, images: dict[str, Tensor], num_tokens: list[int], pruning_seed: int) -> Tensor:
    """(units,) int64 checksum of each unit's pixels plus the step's seed, so that an image is pruned alike anywhere.

    The seed alone where the model takes pixels in a form that doesn't say which are whose.

    Args:
        num_tokens: visual tokens of each unit, as many as `image_units` returns.
    """
    pixels = images["pixel_values"]
    if not family_of(vlm).has_rows_of_pixels or WITHOUT_ROWS & set(images):
        return torch.full((len(num_tokens),), pruning_seed, device=pixels.device)
    if family_of(vlm).splits_samples_into_tiles:
        pixels = pixels.flatten(0, 1)
        if len(pixels) != len(num_tokens):  # tiles of zeros are padding
            pixels = pixels[true_places(pixels.flatten(1).any(dim=1), len(num_tokens))]
    bits = torch.int32 if pixels.element_size() == 4 else torch.int16
    sums = pixels.flatten(1).contiguous().view(bits).sum(dim=1, dtype=torch.int64)
    if "image_grid_thw" in images and len(sums) != len(num_tokens):
        # pixel_values has one row per patch here, not per image, and a token is made of as many patches everywhere.
        patches_of_token = len(sums) // sum(num_tokens)
        sums = torch.stack([patches.sum() for patches in sums.split([n * patches_of_token for n in num_tokens])])
    return sums + pruning_seed


def token_inputs(
    vlm: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    inputs: Mapping[str, Tensor | None],
    images: dict[str, Tensor],
    positions: Tensor | None = None,
) -> dict[str, Tensor]:
    """Inputs of the language model with one value per token, (..., B, L): token types, 3-D positions.

    Args:
        input_ids, attention_mask: (B, L) the batch with all of its tokens.
        inputs: what the processor gave, TOKEN_INPUTS among it.
        images: as from `image_inputs`.
        positions: (B, 3, L) 3-D positions as from Positions3D; None: computed here, with many host-device syncs.
    """
    by_token = {name: values for name in TOKEN_INPUTS if (values := inputs.get(name)) is not None}
    if not family_of(vlm).has_3d_positions:
        return by_token
    # Such a model uses the types for its positions alone, and computes the 1-D positions of text itself.
    by_token.pop("mm_token_type_ids", None)
    if not images:
        return by_token
    if positions is None:
        positions = positions_3d(vlm.model, vlm.config.image_token_id, input_ids, attention_mask, images)
    return by_token | {"position_ids": positions.transpose(0, 1)}
