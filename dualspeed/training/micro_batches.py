"""Splitting of a batch into micro-batches, because slow steps need the memory of all tokens, fast ones of a tenth."""

from typing import Any

from dualspeed.batch import INPUTS_PER_IMAGE
from dualspeed.errors import SampleError


def micro_batches(inputs: dict[str, Any], num_images: list[int], size: int) -> list[dict[str, Any]]:
    """Split a collated batch into parts of at most `size` samples, each with its own images.

    Args:
        inputs: one row a sample, padded to the longest, or one row an image (or patch), in reading order.
        num_images: (B,) number of images of each sample.

    Raises:
        SampleError: `num_images` has another length than the batch, or the rows of `pixel_values` can't be assigned.
    """
    num_samples = len(inputs["input_ids"])
    if len(num_images) != num_samples:
        raise SampleError(f"num_images counts the images of {len(num_images)} samples, but the batch has {num_samples}")
    # Read once: every copy to the host waits for the accelerator.
    num_patches = inputs["image_grid_thw"].prod(dim=1).tolist() if "image_grid_thw" in inputs else None
    parts = []
    for start in range(0, num_samples, size):
        end = min(start + size, num_samples)
        images = slice(sum(num_images[:start]), sum(num_images[:end]))
        rows = {name: rows_of(name, inputs, num_images, num_patches, slice(start, end), images) for name in inputs}
        parts.append({name: inputs[name][chosen] for name, chosen in rows.items() if chosen is not None})
    return parts


def rows_of(
    name: str,
    inputs: dict[str, Any],
    num_images: list[int],
    num_patches: list[int] | None,
    samples: slice,
    images: slice,
) -> slice | None:
    """Rows of the input `name` that belong to `samples` and their `images`; None if it has no row for them.

    Args:
        num_patches: patches of each image, if `pixel_values` has one row a patch.
    """
    if name not in (*INPUTS_PER_IMAGE, "pixel_values"):
        return samples
    if images.start == images.stop:
        return None
    num_rows = len(inputs[name])
    if name == "pixel_values" and num_patches is not None:
        return slice(sum(num_patches[: images.start]), sum(num_patches[: images.stop]))
    if num_rows == sum(num_images):
        return images
    if num_rows == len(num_images):
        return samples
    raise SampleError(
        f"{name} has {num_rows} rows; valid: one an image ({sum(num_images)}) or one a sample ({len(num_images)})"
    )
