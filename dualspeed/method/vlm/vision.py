"""Image encoding: from pixels to projected visual tokens, and to the fields of VisualTokens that pruners need.

Everything goes through the model's public `get_image_features`; tower.py adds what that doesn't offer.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from importlib import import_module

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from dualspeed.method.vlm.encoder import image_encoder
from dualspeed.method.vlm.entrance import all_features, projected, with_features
from dualspeed.method.vlm.families import family_of
from dualspeed.method.vlm.family import Family
from dualspeed.method.vlm.inputs import image_units
from dualspeed.method.vlm.pixel_pruning import KeptSquares, prune_pixels
from dualspeed.method.vlm.square_towers import in_token_order, squares_of, standardised_squares, with_window_order
from dualspeed.method.vlm.tower import capture_fields, per_token, skip_unused_vision_layers
from dualspeed.method.vlm.tower_states import ATTENTION_FIELDS, TowerStates, states_in_place


@dataclass(frozen=True)
class EncodedImages:
    """Encoded images of a batch in reading order; image i has N_i tokens, all of them P."""

    family: Family
    """Record of the model's family."""
    output: ModelOutput
    """Result of the model's `get_image_features`."""
    features: list[Tensor]
    """(N_i, D) projected features of each image, newline tokens included."""
    described: dict[str, Tensor]
    """(P, ...) the requested fields of VisualTokens, by name."""
    tiles: Tensor | None
    """(P,) index of each token's tile within its image, -1 for newlines, on the CPU; None unless requested."""
    inputs: dict[str, Tensor]
    """Inputs of the tower that they were encoded from."""
    squares: KeptSquares | None = None
    """Squares of patches that entered the tower, one a token; None: all."""

    @property
    def num_placeholders(self) -> list[int]:
        """Tokens of each image before squares were left out: its placeholders in the sequence."""
        return [len(features) for features in self.features] if self.squares is None else self.squares.before

    def all_features(self) -> list[Tensor]:
        """All outputs of the projector, features for deeper layers (DeepStack) included."""
        return [*self.features, *all_features(self.family, self.output)]

    def in_runs(self, lengths: list[int], seeds: Tensor | None) -> tuple["EncodedImages", Tensor | None]:
        """The same features, and seeds, as images of these numbers of tokens: the runs of placeholders."""
        images = replace(self, features=list(torch.cat(self.features).split(lengths)))
        return images, None if seeds is None else torch.stack([run.sum() for run in seeds.split(lengths)])

    def keeping(self, features: list[Tensor], positions: list[Tensor], num_virtual_tokens: int) -> ModelOutput:
        """Copy of `output` with other features, in the form that the model returns them in.

        Args:
            features: (l + K_u, D) isolator and kept features of each unit.
            positions: (K_u,) positions of the kept features among the P tokens.
            num_virtual_tokens: length l of the isolator.
        """
        return with_features(self.family, self.output, features, positions, num_virtual_tokens)


def encode_images(
    vlm: PreTrainedModel,
    images: dict[str, Tensor],
    needs: Collection[str] = (),
    with_tiles: bool = False,
    pixel_pruning: float | None = None,
    grids: Sequence[Sequence[int]] = (),
    states: TowerStates | None = None,
) -> EncodedImages:
    """Run vision tower and projector once over all images of a batch.

    Args:
        images: inputs of the model's `get_image_features`, pixel_values among them.
        needs: fields of VisualTokens to return; only families.CAPTURED_FIELDS are considered, and `before_merger` in
            families that have it.
        with_tiles: True to return each token's tile.
        pixel_pruning: tolerance of `prune_pixels`, which leaves squares of patches out; None: all enter the tower.
        grids: as in `prune_pixels`.
        states: kept outputs of the tower's layers for these images, which are not run then; None: they are.
    """
    squares = None
    if pixel_pruning is not None:
        images, squares = prune_pixels(vlm, images, grids, pixel_pruning)
    images = with_window_order(vlm, images)
    captured: dict[str, Tensor] = {}
    if states is not None:
        captured = {name: values for name, values in states.fields.items() if name in needs}
        needs = [name for name in needs if name not in ATTENTION_FIELDS]
    with (
        skip_unused_vision_layers(vlm) as layer_arguments,
        states_in_place(vlm, states),
        capture_fields(vlm, needs, captured),
    ):
        output = image_encoder(vlm)(**images, **layer_arguments, return_dict=True)
    features = image_units(vlm, output)
    if family_of(vlm).projects_later:
        output = projected(family_of(vlm), features)
    return EncodedImages(
        family=family_of(vlm),
        output=output,
        features=features,
        described={name: by_token(vlm, name, values, features, images) for name, values in captured.items()},
        tiles=token_tiles(vlm, features, images) if with_tiles else None,
        inputs=images,
        squares=squares,
    )


def by_token(
    vlm: PreTrainedModel, name: str, values: Tensor, features: list[Tensor], images: dict[str, Tensor]
) -> Tensor:
    """(P, ...) a captured field in the order of the projected tokens; arguments as in `pack`."""
    if name == "before_merger":
        return in_token_order(vlm, standardised_squares(vlm, values, [len(unit) for unit in features]), images)
    if family_of(vlm).merges_patches:
        return in_token_order(vlm, squares_of(vlm, values), images)
    return pack(vlm, values, features, images, newline_fill(name))


def token_tiles(vlm: PreTrainedModel, features: list[Tensor], images: dict[str, Tensor]) -> Tensor:
    """(P,) index of each token's tile within its image, -1 for newlines; 0 in models that don't pack tiles.

    On the CPU: it follows from the images' sizes.
    """
    if not family_of(vlm).packs_tiles:
        return torch.zeros(sum(map(len, features)), dtype=torch.long)
    num_tiles = tiles_per_image(vlm, images)
    side = vlm.config.vision_config.image_size // vlm.config.vision_config.patch_size
    tiles = torch.cat([torch.arange(n) for n in num_tiles])
    return pack(vlm, tiles[:, None].expand(-1, side * side).float(), features, images, -1.0).long()


def newline_fill(name: str) -> float:
    """Fill value of newline tokens in a field of VisualTokens."""
    return -torch.inf if name == "cls_attention" else 0.0


def tiles_per_image(vlm: PreTrainedModel, images: dict[str, Tensor]) -> list[int]:
    """Number of tiles of each image, the base tile included."""
    size_to_num_tiles = import_module(type(vlm).__module__).image_size_to_num_patches
    config = vlm.config
    num_tiles = [
        size_to_num_tiles(size, config.image_grid_pinpoints, config.vision_config.image_size)
        for size in images["image_sizes"]
    ]
    # OneVision cuts an image into tiles only if it is its sample's only one.
    images_of_sample = images.get("batch_num_images")
    if images_of_sample is None:
        return num_tiles
    is_single = images_of_sample.repeat_interleave(images_of_sample) == 1
    return [n if single else 1 for n, single in zip(num_tiles, is_single.tolist(), strict=True)]


def pack(
    vlm: PreTrainedModel, values: Tensor, features: list[Tensor], images: dict[str, Tensor], newline: float
) -> Tensor:
    """Reorder values of patches, (tiles, patches, ...), to the order of the projected tokens, (P, ...).

    Args:
        features, images: as in EncodedImages and `encode_images`.
        newline: fill value of newline tokens.
    """
    packing_settings = family_of(vlm).packing_settings
    if not packing_settings:
        return per_token(values, sum(map(len, features)) // len(values)).flatten(0, 1)
    vectors = values.flatten(2) if values.dim() > 2 else values[..., None]
    per_image = torch.split(vectors, tiles_per_image(vlm, images))
    image_newline = vectors.new_full((vectors.shape[-1],), newline)
    settings = {name: getattr(vlm.config, name) for name in packing_settings}
    packed, _ = vlm.model.pack_image_features(per_image, images["image_sizes"], image_newline=image_newline, **settings)
    return torch.cat(packed).unflatten(-1, values.shape[2:]) if values.dim() > 2 else torch.cat(packed)[:, 0]


def pruning_units(images: EncodedImages, seeds: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
    """Split the P tokens into units of pruning: images, or the tiles of images without their newlines.

    Args:
        seeds: one an image, or None.

    Returns:
        positions of each unit's tokens, ascending, on the CPU, and (U,) seeds of the units.
    """
    sizes = [len(features) for features in images.features]
    per_image = torch.arange(sum(sizes)).split(sizes)
    if images.tiles is None:
        return list(per_image), seeds
    units, unit_seeds = [], []
    for index, (positions, tiles) in enumerate(zip(per_image, images.tiles.split(sizes), strict=True)):
        for tile in range(int(tiles.max()) + 1):
            units.append(positions[tiles == tile])
            if seeds is not None:
                unit_seeds.append(seeds[index] + tile)
    return units, torch.stack(unit_seeds) if unit_seeds else None
