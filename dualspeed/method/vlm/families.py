"""What a family of VLMs needs of its own; all else goes by the conventions that transformers' VLMs share.

Those are `get_image_features`, a forward that takes `mm_encoder_outputs` and `logits_to_keep`, and
`config.image_token_id`. A new family that keeps to them needs nothing here.
"""

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dualspeed.errors import ModelError, UnknownInputError
from dualspeed.method.sequences import Sequences
from dualspeed.method.vlm.tower import RECORDED

TOWER_FAMILIES = (
    *("gemma3", "idefics3", "internvl", "llava", "llava_next", "llava_onevision", "paligemma", "smolvlm", "vipllava"),
)
"""model_type of those whose vision tower pruners can look into: square tiles, a token for each patch or for a square of
patches, layers of plain attention. Qwen-VL's windows and Pixtral's single sequence of all images are not, and both
turn queries and keys by position inside the attention."""
TILE_FAMILIES = ("idefics3", "smolvlm")
"""model_type of those that write an image's tiles as runs of placeholders between row and column tokens."""
TOKEN_INPUTS = ("token_type_ids", "mm_token_type_ids")
"""Inputs with one number a token, which follow the tokens that stay."""


def check_family(vlm: PreTrainedModel, pruner: str, needs: tuple[str, ...], prune_budget: str) -> None:
    """Raise ModelError, with the reason, for a model or a pruner that can't be trained with."""
    family = type(vlm).__name__
    takes = inspect.signature(vlm.forward).parameters
    lacking = [f"its forward takes no {name}" for name in ("mm_encoder_outputs", "logits_to_keep") if name not in takes]
    lacking += [] if hasattr(vlm, "get_image_features") else ["it has no get_image_features"]
    lacking += [] if getattr(vlm.config, "image_token_id", None) is not None else ["its config has no image_token_id"]
    if lacking:
        raise ModelError(
            f"{family} can't be trained on pruned tokens, since {', '.join(lacking)}: visual tokens must stand in the "
            "sequence of the language model, and enter it as transformers' VLMs take them"
        )
    read = [name for name in needs if name in RECORDED]
    if read and vlm.config.model_type not in TOWER_FAMILIES:
        raise ModelError(
            f"pruner {pruner!r} looks at the vision tower's {', '.join(read)}, which can be read off where the tower "
            f"sees square tiles apart and its attention adds no positions, as in {', '.join(TOWER_FAMILIES)}, not in "
            f"{family}; methods that look at none of these serve any model: divprune, cdpruner, tome, "
            "spatial_pool, uniform, random"
        )
    if prune_budget == "tile" and vlm.config.model_type not in ("llava", "llava_next", *TILE_FAMILIES):
        raise ModelError(f"prune_budget 'tile' is for models that cut images into tiles, not for {family}; use 'image'")


def image_inputs(vlm: PreTrainedModel, inputs: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Those of a batch's inputs that the vision tower takes; a TypeError names what neither it nor a text takes."""
    takes = inspect.signature(vlm.get_image_features).parameters
    unknown = [name for name in inputs if name not in takes and name not in TOKEN_INPUTS and inputs[name] is not None]
    if unknown:
        raise UnknownInputError(
            f"{type(vlm).__name__}: unknown input {', '.join(unknown)}; images take {', '.join(takes)}"
        )
    return {name: values for name, values in inputs.items() if name in takes and values is not None}


def image_units(vlm: PreTrainedModel, pooled: Tensor | list[Tensor]) -> list[Tensor]:
    """The visual tokens that are pruned together, (N_i, D) each: an image's, or for TILE_FAMILIES a tile's.

    Args:
        pooled: what `get_image_features` returns, images in reading order.
    """
    if vlm.config.model_type not in TILE_FAMILIES:
        return list(pooled)
    # These return all tokens of a sample at once; a tile has a fixed number of them.
    vision = vlm.config.vision_config
    num_tokens = (vision.image_size // vision.patch_size) ** 2 // vlm.config.scale_factor**2
    return [tile for sample in pooled for tile in sample.split(num_tokens) if len(tile)]


def image_seeds(vlm: PreTrainedModel, images: dict[str, Tensor], pruning_seed: int) -> Tensor:
    """(units,) int64: a checksum of each unit's pixels, so that an image is pruned alike in any batch."""
    pixels = images["pixel_values"]
    if vlm.config.model_type in TILE_FAMILIES:
        pixels = pixels.flatten(0, 1)
        pixels = pixels[pixels.flatten(1).any(dim=1)]  # all zeros is padding
    bits = torch.int32 if pixels.element_size() == 4 else torch.int16
    sums = pixels.flatten(1).contiguous().view(bits).sum(dim=1, dtype=torch.int64)
    if "image_grid_thw" in images:
        # Here a row is a patch, not an image.
        sums = torch.stack([patches.sum() for patches in sums.split(images["image_grid_thw"].prod(dim=1).tolist())])
    return sums + pruning_seed


def has_3d_positions(vlm: PreTrainedModel) -> bool:
    """Whether image tokens have rotary positions in time, height and width, as in the Qwen-VL families."""
    return hasattr(vlm.model, "compute_3d_position_ids")


def token_inputs(
    vlm: PreTrainedModel, sequences: Sequences, inputs: Mapping[str, Tensor | None], images: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What the language model wants to know about each token, (..., B, L): token types, 3-D positions.

    Args:
        sequences: the batch with all of its tokens.
        inputs: what the processor gave, TOKEN_INPUTS among it.
        images: as from `image_inputs`.
    """
    by_token = {name: values for name in TOKEN_INPUTS if (values := inputs.get(name)) is not None}
    if not has_3d_positions(vlm):
        return by_token
    # The model needs the types for nothing else, and computes 1-D positions of a text alone itself.
    by_token.pop("mm_token_type_ids", None)
    if not images:
        return by_token
    positions = vlm.model.compute_3d_position_ids(
        input_ids=sequences.input_ids,
        inputs_embeds=None,
        image_grid_thw=images["image_grid_thw"],
        video_grid_thw=None,
        attention_mask=sequences.attention_mask,
        past_key_values=None,
        mm_token_type_ids=(sequences.input_ids == vlm.config.image_token_id).int(),
    )
    return by_token | {"position_ids": positions}


def blank_image(vlm: PreTrainedModel) -> dict[str, Tensor]:
    """One blank image as the model's `get_image_features` takes it."""
    build = BLANK_IMAGES.get(vlm.config.model_type, blank_square)
    blank = build(vlm)
    return {
        name: values.to(vlm.device, vlm.dtype if values.is_floating_point() else None) for name, values in blank.items()
    }


def blank_square(vlm: PreTrainedModel) -> dict[str, Tensor]:
    """For towers of one resolution."""
    size = vlm.config.vision_config.image_size
    side = size if isinstance(size, int) else size[0]
    return {"pixel_values": torch.zeros(1, 3, side, side)}


def blank_tiles(vlm: PreTrainedModel) -> dict[str, Tensor]:
    """For LLaVA-NeXT and -OneVision: the base tile and those of a square picture."""
    module = import_module(type(vlm).__module__)
    side = vlm.config.vision_config.image_size
    num_tiles = module.image_size_to_num_patches([side, side], vlm.config.image_grid_pinpoints, side)
    return {"pixel_values": torch.zeros(1, num_tiles, 3, side, side), "image_sizes": torch.tensor([[side, side]])}


def blank_patches(vlm: PreTrainedModel) -> dict[str, Tensor]:
    """For the Qwen-VL families: the patches of one token."""
    vision = vlm.config.vision_config
    side = vision.spatial_merge_size
    channels = getattr(vision, "in_channels", 3)
    width = channels * vision.temporal_patch_size * vision.patch_size**2
    return {"pixel_values": torch.zeros(side * side, width), "image_grid_thw": torch.tensor([[1, side, side]])}


def blank_tile(vlm: PreTrainedModel) -> dict[str, Tensor]:
    """For Idefics3 and SmolVLM, which take pictures of zeros for padding."""
    side = vlm.config.vision_config.image_size
    return {"pixel_values": torch.ones(1, 1, 3, side, side)}


def blank_any_size(vlm: PreTrainedModel) -> dict[str, Tensor]:
    """For Mistral 3: the pixels of 2 x 2 tokens; of a single one it would lose a dimension."""
    side = 2 * vlm.config.vision_config.patch_size * vlm.config.spatial_merge_size
    return {"pixel_values": torch.zeros(1, 3, side, side), "image_sizes": torch.tensor([[side, side]])}


BLANK_IMAGES: dict[str, Callable[[PreTrainedModel], dict[str, Tensor]]] = {
    "llava_next": blank_tiles,
    "llava_onevision": blank_tiles,
    "qwen2_vl": blank_patches,
    "qwen2_5_vl": blank_patches,
    "qwen3_vl": blank_patches,
    "idefics3": blank_tile,
    "smolvlm": blank_tile,
    "mistral3": blank_any_size,
}


def language_parameters(vlm: PreTrainedModel) -> set[nn.Parameter]:
    """Parameters of the language model, its embeddings and its head."""
    head = vlm.get_output_embeddings()
    return {*vlm.get_decoder().parameters(), *([] if head is None else head.parameters())}
