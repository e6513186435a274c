"""From pixels to projected visual tokens, and what pruners want to know about them.

Everything goes through the model's public `get_image_features`; what it doesn't offer is in tower.py.
"""

from collections.abc import Collection
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from dualspeed.method.vlm.families import image_units, language_parameters
from dualspeed.method.vlm.tower import per_token, record_tower, skip_unused_vision_layers


@dataclass(frozen=True)
class EncodedImages:
    """The images of a batch in reading order; image i has N_i tokens, P in all."""

    output: ModelOutput
    """What the model's `get_image_features` returned."""
    features: list[Tensor]
    """(N_i, D) projected features of each image, LLaVA-NeXT's newlines packed in."""
    described: dict[str, Tensor]
    """(P, ...) what was asked for of the fields of VisualTokens, under their names."""
    tiles: Tensor | None
    """(P,) which tile of its image a token belongs to, -1 for newlines; None unless asked for."""

    def all_features(self) -> list[Tensor]:
        """Everything that the projector made of the images: what deeper layers add (DeepStack) as well."""
        deepstack = getattr(self.output, "deepstack_features", None) or []
        return [*self.features, *(torch.cat(list(layer)) for layer in deepstack)]

    def keeping(self, features: list[Tensor], positions: list[Tensor], num_virtual_tokens: int) -> ModelOutput:
        """The output with other features, in the form that the model gave it.

        Args:
            features: (l + K_u, D) isolator and kept features of each unit.
            positions: (K_u,) which of the P tokens those are.
            num_virtual_tokens: l.
        """
        pooled = self.output.pooler_output
        changed: dict[str, Any] = {"pooler_output": torch.cat(features) if isinstance(pooled, Tensor) else features}
        if deepstack := getattr(self.output, "deepstack_features", None):
            # What deeper layers add to the image's tokens: to the isolator nothing.
            changed["deepstack_features"] = [
                [F.pad(torch.cat(list(layer))[kept], (0, 0, num_virtual_tokens, 0)) for kept in positions]
                for layer in deepstack
            ]
        return type(self.output)(**changed)


def encode_images(
    vlm: PreTrainedModel, images: dict[str, Tensor], needs: Collection[str] = (), with_tiles: bool = False
) -> EncodedImages:
    """Run vision tower and projector once over all images of a batch.

    Args:
        images: pixel_values, and what else the model's `get_image_features` takes.
        needs: fields of VisualTokens to describe the tokens by, those of tower.RECORDED.
        with_tiles: whether to say which tile a token belongs to.
    """
    record: dict[str, Tensor] = {}
    with skip_unused_vision_layers(vlm) as layer_arguments, record_tower(vlm, needs, record):
        output = vlm.get_image_features(**images, **layer_arguments, return_dict=True)
    features = image_units(vlm, output.pooler_output)
    return EncodedImages(
        output=output,
        features=features,
        described={name: pack(vlm, values, features, images, of_newline(name)) for name, values in record.items()},
        tiles=token_tiles(vlm, features, images) if with_tiles else None,
    )


def token_tiles(vlm: PreTrainedModel, features: list[Tensor], images: dict[str, Tensor]) -> Tensor:
    """(P,) tile of each token within its image, -1 for newlines; a model without tiles has one an image."""
    if not has_packed_tiles(vlm):
        return torch.zeros(sum(map(len, features)), dtype=torch.long, device=features[0].device)
    num_tiles = tiles_per_image(vlm, images)
    side = vlm.config.vision_config.image_size // vlm.config.vision_config.patch_size
    tiles = torch.cat([torch.arange(n, device=features[0].device) for n in num_tiles])
    return pack(vlm, tiles[:, None].expand(-1, side * side).float(), features, images, -1.0).long()


def of_newline(name: str) -> float:
    """What a newline token, which no patch stands behind, has in place of a field of VisualTokens."""
    return -torch.inf if name == "cls_attention" else 0.0


def has_packed_tiles(vlm: PreTrainedModel) -> bool:
    """Whether the model cuts images into tiles and packs their tokens with newlines."""
    return vlm.config.model_type in ("llava_next", "llava_onevision")


def tiles_per_image(vlm: PreTrainedModel, images: dict[str, Tensor]) -> list[int]:
    """Tiles of each image, the base tile included."""
    size_to_num_tiles = import_module(type(vlm).__module__).image_size_to_num_patches
    config = vlm.config
    num_tiles = [
        size_to_num_tiles(size, config.image_grid_pinpoints, config.vision_config.image_size)
        for size in images["image_sizes"]
    ]
    # OneVision cuts none of several images of a sample.
    images_of_sample = images.get("batch_num_images")
    if images_of_sample is None:
        return num_tiles
    is_single = images_of_sample.repeat_interleave(images_of_sample) == 1
    return [n if single else 1 for n, single in zip(num_tiles, is_single.tolist(), strict=True)]


def pack(
    vlm: PreTrainedModel, values: Tensor, features: list[Tensor], images: dict[str, Tensor], newline: float
) -> Tensor:
    """Bring what belongs to patches, (tiles, patches, ...), into the order of the projected tokens, (P, ...).

    Args:
        features, images: as in EncodedImages and `encode_images`.
        newline: what newline tokens get.
    """
    if not has_packed_tiles(vlm):
        return per_token(values, sum(map(len, features)) // len(values)).flatten(0, 1)
    vectors = values.flatten(2) if values.dim() > 2 else values[..., None]
    per_image = torch.split(vectors, tiles_per_image(vlm, images))
    image_newline = vectors.new_full((vectors.shape[-1],), newline)
    named = {"image_newline": image_newline}
    if vlm.config.model_type == "llava_next":
        named["vision_feature_select_strategy"] = vlm.config.vision_feature_select_strategy
    else:
        named["vision_aspect_ratio"] = vlm.config.vision_aspect_ratio
    packed, _ = vlm.model.pack_image_features(per_image, images["image_sizes"], **named)
    return torch.cat(packed).unflatten(-1, values.shape[2:]) if values.dim() > 2 else torch.cat(packed)[:, 0]


def pruning_units(images: EncodedImages, seeds: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
    """Split the P tokens into the units that are pruned apart: images, or the tiles of images without their newlines.

    Returns:
        positions of each unit's tokens, ascending, and one seed (U,) a unit.
    """
    sizes = [len(features) for features in images.features]
    device = images.features[0].device
    per_image = torch.arange(sum(sizes), device=device).split(sizes)
    if images.tiles is None:
        return list(per_image), seeds
    units, unit_seeds = [], []
    for index, (positions, tiles) in enumerate(zip(per_image, images.tiles.split(sizes), strict=True)):
        for tile in range(int(tiles.max()) + 1):
            units.append(positions[tiles == tile])
            if seeds is not None:
                unit_seeds.append(seeds[index] + tile)
    return units, torch.stack(unit_seeds) if unit_seeds else None


def trainable_visual_parameters(vlm: PreTrainedModel) -> list[nn.Parameter]:
    """Trainable parameters outside the language model: projector, newline, vision tower."""
    language = language_parameters(vlm)
    return [parameter for parameter in vlm.parameters() if parameter.requires_grad and parameter not in language]
