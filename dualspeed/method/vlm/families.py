"""Families of VLMs: one record each for what differs between them.

Everything else follows the conventions of transformers' VLMs: `get_image_features`, a forward that takes
`mm_encoder_outputs` and `logits_to_keep`, `get_decoder`, and `config.image_token_id`. A family that keeps to them needs
no record: `conventional` finds its modules by their usual names.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor
from transformers import PreTrainedModel

from dualspeed.errors import ModelError
from dualspeed.method.vlm import blank_images
from dualspeed.pruners import PRUNERS

CAPTURED_FIELDS = ("cls_attention", "keys", "pre_projection")
"""Fields of VisualTokens that are captured during the forward of a readable tower."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Record of a family: its differences from the others. Paths are dotted attribute names."""

    tower: str = "model.vision_tower"
    """Path of the vision tower."""
    layers: str = ""
    """Path of the tower's layers, within the tower; empty: unknown."""
    unused: tuple[str, ...] = ()
    """Paths within the tower of modules that the image features never depend on, where the tower has them."""
    projector: tuple[str, ...] = ("model.multi_modal_projector",)
    """Paths of all modules and parameters between tower and language model; the tower's features enter the first."""
    ignored: tuple[str, ...] = ()
    """Paths of modules that neither images nor text pass through."""

    selects_layer: bool = False
    """True if `vision_feature_layer` selects the layer whose output becomes the features; later ones never run then."""
    drops_first_position: bool = False
    """True if the tower's first position is always dropped; else `vision_feature_select_strategy` decides."""
    has_readable_tower: bool = False
    """True if CAPTURED_FIELDS can be captured: square tiles, one token for each patch or square of patches, and layers
    of plain attention. The Qwen-VL families' windows and Pixtral's one sequence of all images are not such, and both
    rotate queries and keys inside the attention."""
    projects_single_patches: bool = False
    """True if the projector maps the patches of one layer one by one, so that CLIP's own projection fits them too."""

    merges_patches: bool = False
    """True if the first module of `projector` is a merger that takes the patches of all images in one sequence, square
    by square; `before_merger` can be captured then."""
    orders_by_window: bool = False
    """True if that sequence is ordered by attention windows; the tower reorders the merger's output."""

    packing_settings: tuple[str, ...] = ()
    """Config keys that `pack_image_features` takes where an image's tiles are packed with newline tokens; empty: the
    features aren't packed."""
    splits_samples_into_tiles: bool = False
    """True if `get_image_features` returns all tiles of a sample as one entry. A tile is then a unit of pruning, and
    its placeholders stand between row and column tokens; tiles of zeros are padding."""
    has_tile_budget: bool = False
    """True if `prune_budget: tile` is meaningful."""
    has_3d_positions: bool = False
    """True if image tokens have rotary positions in time, height and width."""
    blank_image: Callable[[PreTrainedModel], dict[str, Tensor]] = blank_images.square
    """Function that makes the inputs of `get_image_features` for one blank image."""

    @property
    def packs_tiles(self) -> bool:
        """True if images are cut into tiles whose tokens are packed with newlines."""
        return bool(self.packing_settings)


LLAVA = Family(
    layers="encoder.layers",
    unused=("post_layernorm", "head"),
    selects_layer=True,
    has_readable_tower=True,
    projects_single_patches=True,
    has_tile_budget=True,
)
# Their features are the tower's last hidden state, after `post_layernorm`.
SIGLIP = Family(layers="encoder.layers", unused=("head",), has_readable_tower=True)
IDEFICS3 = Family(
    tower="model.vision_model",
    layers="encoder.layers",
    projector=("model.connector",),
    has_readable_tower=True,
    splits_samples_into_tiles=True,
    has_tile_budget=True,
    blank_image=blank_images.tile_of_ones,
)
QWEN_VL = Family(
    tower="model.visual",
    layers="blocks",
    projector=("model.visual.merger",),
    merges_patches=True,
    has_3d_positions=True,
    blank_image=blank_images.patches_of_one_token,
)

FAMILIES: dict[str, Family] = {
    "gemma3": SIGLIP,
    "idefics3": IDEFICS3,
    "internvl": Family(layers="encoder.layer", has_readable_tower=True),
    "llava": LLAVA,
    "llava_next": Family(
        layers="encoder.layers",
        unused=("post_layernorm", "head"),
        projector=("model.multi_modal_projector", "model.image_newline"),
        selects_layer=True,
        has_readable_tower=True,
        projects_single_patches=True,
        packing_settings=("vision_feature_select_strategy",),
        has_tile_budget=True,
        blank_image=blank_images.square_in_tiles,
    ),
    "llava_onevision": Family(
        layers="encoder.layers",
        unused=("post_layernorm", "head"),
        projector=("model.multi_modal_projector", "model.image_newline"),
        selects_layer=True,
        has_readable_tower=True,
        packing_settings=("vision_aspect_ratio",),
        blank_image=blank_images.square_in_tiles,
    ),
    "mistral3": Family(layers="transformer.layers", blank_image=blank_images.two_by_two_tokens),
    "paligemma": SIGLIP,
    "qwen2_5_vl": replace(QWEN_VL, orders_by_window=True),
    "qwen2_vl": QWEN_VL,
    "qwen3_vl": Family(
        tower="model.visual",
        layers="blocks",
        projector=("model.visual.merger", "model.visual.deepstack_merger_list"),
        merges_patches=True,
        has_3d_positions=True,
        blank_image=blank_images.patches_of_one_token,
    ),
    "smolvlm": IDEFICS3,
    "vipllava": Family(
        layers="encoder.layers",
        unused=("post_layernorm", "head"),
        selects_layer=True,
        drops_first_position=True,
        has_readable_tower=True,
    ),
}
"""config.model_type -> family."""
CONVENTIONAL_TOWERS = ("vision_tower", "vision_model", "visual", "vision_encoder")


def family_of(vlm: PreTrainedModel) -> Family:
    """Record of a model's family, or one made by `conventional`."""
    return FAMILIES.get(vlm.config.model_type) or conventional(vlm)


def is_listed(vlm: PreTrainedModel) -> bool:
    """True if the model's family has a record of its own."""
    return vlm.config.model_type in FAMILIES


def conventional(vlm: PreTrainedModel) -> Family:
    """Record of a family that has none: modules are found by the names that transformers' VLMs share.

    A merger inside the tower belongs to the projector, as does whatever is part of neither tower nor language model.
    """
    children = dict(vlm.model.named_children())
    tower = next((name for name in CONVENTIONAL_TOWERS if name in children), CONVENTIONAL_TOWERS[0])
    inside = dict(children[tower].named_children()) if tower in children else {}
    return Family(
        tower=f"model.{tower}",
        projector=tuple(f"model.{tower}.{name}" for name in inside if "merger" in name),
        ignored=tuple(f"model.{name}" for name in children if "audio" in name or "video" in name),
        has_3d_positions=hasattr(vlm.model, "compute_3d_position_ids"),
    )


def check_family(vlm: PreTrainedModel, pruner: str, needs: tuple[str, ...], prune_budget: str) -> None:
    """Raise ModelError, with the reason, if a model can't be trained in fast mode, or not with this pruner."""
    model_class = type(vlm).__name__
    parameters = inspect.signature(vlm.forward).parameters
    lacking = [
        f"its forward takes no {name}" for name in ("mm_encoder_outputs", "logits_to_keep") if name not in parameters
    ]
    lacking += [] if hasattr(vlm, "get_image_features") else ["it has no get_image_features"]
    lacking += [] if getattr(vlm.config, "image_token_id", None) is not None else ["its config has no image_token_id"]
    if lacking:
        raise ModelError(
            f"{model_class} can't be trained on pruned tokens, since {', '.join(lacking)}: visual tokens must stand in "
            "the sequence of the language model, and enter it as transformers' VLMs take them"
        )
    family = family_of(vlm)
    captured = [name for name in needs if name in CAPTURED_FIELDS]
    if captured and not family.has_readable_tower:
        readable = [name for name, other in FAMILIES.items() if other.has_readable_tower]
        others = [name for name, other in PRUNERS.items() if not set(other.needs) & set(CAPTURED_FIELDS)]
        raise ModelError(
            f"pruner {pruner!r} looks at the vision tower's {', '.join(captured)}, which can be captured where the "
            "tower encodes each square tile by itself and its attention adds no positions, as in "
            f"{', '.join(readable)}, not in {model_class}; methods that need none of these work with any model: "
            f"{', '.join(others)}"
        )
    if prune_budget == "tile" and not family.has_tile_budget:
        raise ModelError(
            f"prune_budget 'tile' is for models that cut images into tiles, not for {model_class}; use 'image'"
        )


def check_clip_tower(vlm: PreTrainedModel, clip_width: int, folder: str) -> None:
    """Raise ModelError unless CLIP's projection fits what the projector takes: single patches of a tower like CLIP's.

    Args:
        clip_width: width of the vision tower of the CLIP in `folder`.
    """
    vision = vlm.config.vision_config
    is_clip = vision.model_type == "clip_vision_model" and vision.hidden_size == clip_width
    if not (is_clip and family_of(vlm).projects_single_patches):
        raise ModelError(
            f"relevance_clip: {folder} projects patches of a CLIP tower of width {clip_width}, which those of "
            f"{type(vlm).__name__} with a {vision.model_type} of width {vision.hidden_size} are not; without "
            "relevance_clip the language model's own embeddings serve any model"
        )
