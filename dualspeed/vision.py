"""From pixels to projected visual tokens, and what pruners want to know about them.

Everything goes through the model's public `get_image_features`; what it doesn't offer is in tower.py.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dualspeed.tower import positive_feature_layer, record_tower, skip_unused_vision_layers


@dataclass(frozen=True)
class EncodedImages:
    """The images of a batch in reading order; image i has N_i tokens, P in all."""

    features: list[Tensor]
    """(N_i, D) projected features of each image, LLaVA-NeXT's newlines packed in."""
    described: dict[str, Tensor]
    """(P, ...) what was asked for of the fields of VisualTokens, under their names."""
    tiles: Tensor | None
    """(P,) which tile of its image a token belongs to, -1 for newlines; None unless asked for."""


def encode_images(
    vlm: PreTrainedModel,
    pixel_values: Tensor,
    image_sizes: Tensor | None = None,
    needs: Collection[str] = (),
    with_tiles: bool = False,
) -> EncodedImages:
    """Run vision tower and projector once over all images of a batch.

    Args:
        pixel_values: (images, 3, H, W), or (images, tiles, 3, H, W) for LLaVA-NeXT.
        image_sizes: (images, 2) original heights and widths, for models that take them.
        needs: fields of VisualTokens to describe the tokens by, those of tower.RECORDED.
        with_tiles: whether to say which tile a token belongs to.
    """
    arguments = {"pixel_values": pixel_values} | ({} if image_sizes is None else {"image_sizes": image_sizes})
    record: dict[str, Tensor] = {}
    # Counted from the front, since layers at the end are left out.
    arguments["vision_feature_layer"] = positive_feature_layer(vlm)
    with skip_unused_vision_layers(vlm), record_tower(vlm, needs, record):
        features = list(vlm.get_image_features(**arguments, return_dict=True).pooler_output)
    return EncodedImages(
        features=features,
        described={name: pack(vlm, values, image_sizes, of_newline(name)) for name, values in record.items()},
        tiles=token_tiles(vlm, features, image_sizes) if with_tiles else None,
    )


def token_tiles(vlm: PreTrainedModel, features: list[Tensor], image_sizes: Tensor | None) -> Tensor:
    """(P,) tile of each token within its image, -1 for newlines; a model without tiles has one an image."""
    if not has_packed_tiles(vlm):
        return torch.zeros(sum(map(len, features)), dtype=torch.long, device=features[0].device)
    num_tiles = tiles_per_image(vlm, image_sizes)
    side = vlm.config.vision_config.image_size // vlm.config.vision_config.patch_size
    tiles = torch.cat([torch.arange(n, device=features[0].device) for n in num_tiles])
    return pack(vlm, tiles[:, None].expand(-1, side * side).float(), image_sizes, -1.0).long()


def of_newline(name: str) -> float:
    """What a newline token, which no patch stands behind, has in place of a field of VisualTokens."""
    return -torch.inf if name == "cls_attention" else 0.0


def has_packed_tiles(vlm: PreTrainedModel) -> bool:
    """Whether the model cuts images into tiles and packs their tokens with newlines, as LLaVA-NeXT does."""
    return hasattr(vlm, "pack_image_features")


def tiles_per_image(vlm: PreTrainedModel, image_sizes: Tensor) -> list[int]:
    """Tiles of each image, the base tile included."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config = vlm.config
    return [
        image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
        for size in image_sizes
    ]


def pack(vlm: PreTrainedModel, values: Tensor, image_sizes: Tensor | None, newline: float) -> Tensor:
    """Bring what belongs to patches, (tiles, patches, ...), into the order of the projected tokens, (P, ...)."""
    if not has_packed_tiles(vlm):
        return values.flatten(0, 1)
    vectors = values.flatten(2) if values.dim() > 2 else values[..., None]
    per_image = torch.split(vectors, tiles_per_image(vlm, image_sizes))
    strategy = vlm.config.vision_feature_select_strategy
    image_newline = vectors.new_full((vectors.shape[-1],), newline)
    packed, _ = vlm.pack_image_features(per_image, image_sizes, strategy, image_newline=image_newline)
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


def image_seeds(pixel_values: Tensor, pruning_seed: int) -> Tensor:
    """(images,) int64: a checksum of each image's pixels, so that an image is pruned alike in any batch."""
    bits = torch.int32 if pixel_values.element_size() == 4 else torch.int16
    return pixel_values.flatten(1).contiguous().view(bits).sum(dim=1, dtype=torch.int64) + pruning_seed


def blank_image(vlm: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    """pixel_values and image_sizes of one black image in the VLM's layout."""
    side = vlm.config.vision_config.image_size
    pixel_values = torch.zeros(1, 3, side, side, dtype=vlm.dtype, device=vlm.device)
    if not has_packed_tiles(vlm):
        return pixel_values, None
    image_sizes = torch.tensor([[side, side]], device=vlm.device)
    num_tiles = tiles_per_image(vlm, image_sizes)[0]
    return pixel_values[:, None].expand(-1, num_tiles, -1, -1, -1), image_sizes


def trainable_visual_parameters(vlm: PreTrainedModel) -> list[nn.Parameter]:
    """Trainable parameters outside the language model: projector, newline, vision tower."""
    language = ("model.language_model.", "lm_head.")
    return [p for name, p in vlm.named_parameters() if p.requires_grad and not name.startswith(language)]
