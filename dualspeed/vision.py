"""From pixels to projected visual tokens, and what pruners want to know about them.

Everything goes through the model's public `get_image_features`. Two things it doesn't offer are done here for vision
towers in the style of CLIP: the CLS token's attention, and leaving out the layers after the selected one.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import maybe_install_capturing_hooks


@dataclass(frozen=True)
class EncodedImages:
    """The images of a batch in reading order; image i has N_i tokens, P in all."""

    features: list[Tensor]
    """(N_i, D) projected features of each image, LLaVA-NeXT's newlines packed in."""
    cls_attention: Tensor | None
    """(P,) attention of the CLS token to each token, mean over heads, -inf for newlines; None unless asked for."""
    tiles: Tensor | None
    """(P,) which tile of its image a token belongs to, -1 for newlines; None unless asked for."""


def encode_images(
    vlm: PreTrainedModel,
    pixel_values: Tensor,
    image_sizes: Tensor | None = None,
    with_cls_attention: bool = False,
    with_tiles: bool = False,
) -> EncodedImages:
    """Run vision tower and projector once over all images of a batch.

    Args:
        pixel_values: (images, 3, H, W), or (images, tiles, 3, H, W) for LLaVA-NeXT.
        image_sizes: (images, 2) original heights and widths, for models that take them.
    """
    arguments = {"pixel_values": pixel_values} | ({} if image_sizes is None else {"image_sizes": image_sizes})
    attention: list[Tensor] = []
    capture = record_cls_attention(vlm, attention) if with_cls_attention else nullcontext()
    # Counted from the front, since layers at the end are left out.
    arguments["vision_feature_layer"] = positive_feature_layer(vlm)
    with skip_unused_vision_layers(vlm), capture:
        features = list(vlm.get_image_features(**arguments, return_dict=True).pooler_output)
    return EncodedImages(
        features=features,
        cls_attention=pack_scores(vlm, attention[0], image_sizes, -torch.inf) if with_cls_attention else None,
        tiles=token_tiles(vlm, features, image_sizes) if with_tiles else None,
    )


def token_tiles(vlm: PreTrainedModel, features: list[Tensor], image_sizes: Tensor | None) -> Tensor:
    """(P,) tile of each token within its image, -1 for newlines; a model without tiles has one an image."""
    if not has_packed_tiles(vlm):
        return torch.zeros(sum(map(len, features)), dtype=torch.long, device=features[0].device)
    num_tiles = tiles_per_image(vlm, image_sizes)
    side = vlm.config.vision_config.image_size // vlm.config.vision_config.patch_size
    tiles = torch.cat([torch.arange(n, device=features[0].device) for n in num_tiles])
    return pack_scores(vlm, tiles[:, None].expand(-1, side * side).float(), image_sizes, -1.0).long()


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


def pack_scores(vlm: PreTrainedModel, scores: Tensor, image_sizes: Tensor | None, newline: float) -> Tensor:
    """Bring one number a patch, (tiles, patches), into the order of the projected tokens, (P,)."""
    if not has_packed_tiles(vlm):
        return scores.flatten()
    per_image = torch.split(scores[..., None], tiles_per_image(vlm, image_sizes))
    strategy = vlm.config.vision_feature_select_strategy
    packed, _ = vlm.pack_image_features(per_image, image_sizes, strategy, image_newline=scores.new_tensor([newline]))
    return torch.cat(packed)[:, 0]


def vision_encoder(vlm: PreTrainedModel) -> nn.Module:
    """The part of a CLIP-style vision tower that holds its layers."""
    tower = vlm.model.vision_tower
    return getattr(tower, "vision_model", tower).encoder


def vision_layers(vlm: PreTrainedModel) -> nn.ModuleList:
    """The layers of a CLIP-style vision tower."""
    return vision_encoder(vlm).layers


def positive_feature_layer(vlm: PreTrainedModel) -> int | list[int]:
    """The configured `vision_feature_layer` counted from the front; 0 is the embeddings' output."""
    num_states = vlm.config.vision_config.num_hidden_layers + 1
    selected = vlm.config.vision_feature_layer
    return [layer % num_states for layer in selected] if isinstance(selected, list) else selected % num_states


def selected_vision_layer(vlm: PreTrainedModel) -> int:
    """Index of the last vision layer whose output the model uses."""
    selected = positive_feature_layer(vlm)
    return (max(selected) if isinstance(selected, list) else selected) - 1


@contextmanager
def skip_unused_vision_layers(vlm: PreTrainedModel) -> Iterator[None]:
    """Leave out the vision layers after the selected one while the context is open; the model itself stays whole."""
    encoder = vision_encoder(vlm)
    layers = encoder.layers
    # Installed once for all layers: done while some are missing, those would never be captured afterwards.
    maybe_install_capturing_hooks(vlm.model.vision_tower)
    encoder.layers = layers[: selected_vision_layer(vlm) + 1]
    try:
        yield
    finally:
        encoder.layers = layers


@contextmanager
def record_cls_attention(vlm: PreTrainedModel, record: list[Tensor]) -> Iterator[None]:
    """Append the (tiles, patches) CLS attention of the selected layer to `record` at each run of the vision tower.

    Computed from that layer's q and k alone, so that every layer keeps its fused attention.
    """

    def compute(attention: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        with torch.no_grad():
            record.append(cls_attention(attention, hidden_states))

    attention = vision_layers(vlm)[selected_vision_layer(vlm)].self_attn
    handle = attention.register_forward_pre_hook(compute, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def cls_attention(attention: nn.Module, hidden_states: Tensor) -> Tensor:
    """(B, 1 + N, C) inputs of an attention module -> (B, N) attention of token 0 to the others, mean over heads."""
    batch_size, length, _ = hidden_states.shape
    query = attention.q_proj(hidden_states[:, :1]).view(batch_size, 1, -1, attention.head_dim).transpose(1, 2)
    keys = attention.k_proj(hidden_states).view(batch_size, length, -1, attention.head_dim).transpose(1, 2)
    scores = (query @ keys.transpose(2, 3)).float() * attention.scale
    return scores.softmax(dim=-1).mean(dim=1)[:, 0, 1:]


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
