"""Record of a family of VLMs: what differs between it and the others."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from dualspeed.method.vlm import blank_images, token_counts


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
    """True if CAPTURED_FIELDS can be captured: one token for each patch or square of patches, and layers of plain
    attention over square tiles, or `merges_patches`. Pixtral's one sequence of all images is not such."""
    projects_single_patches: bool = False
    """True if the projector maps the patches of one layer one by one, so that CLIP's own projection fits them too."""

    merges_patches: bool = False
    """True if the first module of `projector` is a merger that takes the patches of all images in one sequence, square
    by square; `before_merger` can be captured then."""
    orders_by_window: bool = False
    """True if that sequence is ordered by attention windows; the tower reorders the merger's output."""
    takes_any_squares: bool = False
    """True if the tower takes any of an image's merge squares, with their positions, order by window and lengths as
    arguments, so that pixels can be pruned before it."""

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
    packs_rows: bool = False
    """True if packed rows were compared with padded ones: positions and cumulative lengths reach every layer."""
    blank_image: Callable[[PreTrainedModel], dict[str, Tensor]] = blank_images.square
    """Function that makes the inputs of `get_image_features` for one blank image."""

    features: str = "pooler_output"
    """Field of what `get_image_features` returns that becomes the image tokens."""
    carried: tuple[str, ...] = ()
    """Further fields of it that the model reads."""
    has_layered_features: bool = False
    """True if all features enter at layers of the language model, (layer, features of each image) in
    `deepstack_features`; the first of them stand for the tokens."""
    projects_later: bool = False
    """True if `get_image_features` leaves out the projector, which the forward applies."""
    runs: str = ""
    """Path of a causal language model within the model that is run on embeddings in its place, where the model's own
    forward demands images or applies the projector; empty: the model itself is run."""
    casts_features: bool = False
    """True if the model's own forward casts features to the tower's dtype, which embeddings may not have: they enter as
    embeddings then."""
    has_rows_of_pixels: bool = True
    """True if `pixel_values` has one row an image, or rows in proportion to its tokens."""
    encodes_tokens_alone: bool = False
    """True if each image token is encoded by itself, and which are one image's only the sequence says."""
    refused_inputs: tuple[str, ...] = ()
    """Inputs of `get_image_features` that change which modules run, so that they aren't taken."""
    conditional: tuple[str, ...] = ()
    """Parts of names of parameters that only images of some sizes pass through, or no text."""
    further_towers: tuple[str, ...] = ()
    """Paths of vision towers beside `tower`."""
    num_placeholders: Callable[[PreTrainedModel, dict[str, Tensor]], int | None] = token_counts.by_configuration
    """Function that counts the tokens that a processor writes for images, from the inputs of `get_image_features`; None
    where the configuration doesn't say."""
    tokens_of_tile: Callable[[PreTrainedModel], int] = token_counts.of_square_tile
    """Function that counts the tokens of a tile, for `splits_samples_into_tiles`."""

    @property
    def enters_as_embeddings(self) -> bool:
        """True if images enter as embeddings, with those of the text."""
        return bool(self.runs) or self.casts_features

    @property
    def packs_tiles(self) -> bool:
        """True if images are cut into tiles whose tokens are packed with newlines."""
        return bool(self.packing_settings)
