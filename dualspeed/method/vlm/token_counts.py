"""Numbers of tokens that images become, as a model's configuration has them: what its processor writes."""

from torch import Tensor
from transformers import PreTrainedModel

from dualspeed.method.vlm.blank_images import merge_side

FIXED = ("mm_tokens_per_image", "vision_soft_tokens_per_image", "num_query_tokens")
"""Settings that hold the number of tokens of any image."""


def by_configuration(vlm: PreTrainedModel, images: dict[str, Tensor]) -> int | None:
    """Tokens of images; None where the configuration doesn't say."""
    if "image_merge_sizes" in images:
        return int((images["image_grid_thw"].prod(dim=-1) // images["image_merge_sizes"] ** 2).sum())
    if "image_grid_thw" in images:
        return of_grid(vlm, images) // merge_side(vlm) ** 2
    fixed = [getattr(vlm.config, name) for name in FIXED if hasattr(vlm.config, name)]
    return fixed[0] * len(images["pixel_values"]) if fixed else None


def of_grid(vlm: PreTrainedModel, images: dict[str, Tensor]) -> int:
    """Places of the images' grids, for models whose grids count tokens, not patches."""
    return int(images["image_grid_thw"].prod(dim=-1).sum())


def of_grid_with_separators(vlm: PreTrainedModel, images: dict[str, Tensor]) -> int:
    """Tokens of images that have one more token behind each row, at the start and at the end."""
    rows, columns = (images["image_grid_thw"][:, 1:] // merge_side(vlm)).unbind(dim=-1)
    return int((rows * (columns + 1) + 2).sum())


def of_square_tile(vlm: PreTrainedModel) -> int:
    """Tokens of a square tile that pixel shuffle joins by `scale_factor`."""
    vision = vlm.config.vision_config
    return (vision.image_size // vision.patch_size) ** 2 // vlm.config.scale_factor**2


def of_fine_or_coarse_tile(vlm: PreTrainedModel) -> int:
    """Tokens of a tile of Granite Docling on the coarse route."""
    return of_square_tile(vlm) if hasattr(vlm.config, "scale_factor") else vlm.model.image_seq_len


def of_latents(vlm: PreTrainedModel) -> int:
    """Tokens of an image that a resampler turns into learned latents."""
    return vlm.config.perceiver_config.resampler_n_latents
