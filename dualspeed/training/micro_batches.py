"""A batch cut into smaller ones: slow steps need the memory of all tokens, fast ones of a tenth of them."""

from typing import Any

from dualspeed.batch import INPUTS_PER_IMAGE
from dualspeed.errors import SampleError


def micro_batches(inputs: dict[str, Any], num_images: list[int], size: int) -> list[dict[str, Any]]:
    """Cut a collated batch into parts of at most `size` samples, each with its own images.

    Args:
        inputs: (B, ...) what belongs to samples, padded to the longest; what belongs to images, in reading order.
        num_images: (B,) how many images each sample has.

    Raises:
        ValueError: `pixel_values` can't be told apart by image.
    """
    num_samples = len(inputs["input_ids"])
    if len(num_images) != num_samples:
        raise SampleError(f"num_images counts the images of {len(num_images)} samples, but the batch has {num_samples}")
    parts = []
    for start in range(0, num_samples, size):
        end = min(start + size, num_samples)
        images = slice(sum(num_images[:start]), sum(num_images[:end]))
        rows = {name: rows_of(name, inputs, num_images, slice(start, end), images) for name in inputs}
        parts.append({name: inputs[name][chosen] for name, chosen in rows.items() if chosen is not None})
    return parts


def rows_of(name: str, inputs: dict[str, Any], num_images: list[int], samples: slice, images: slice) -> slice | None:
    """Which rows of an input belong to `samples` and their `images`; None: it has nothing for them."""
    if name not in (*INPUTS_PER_IMAGE, "pixel_values"):
        return samples
    if images.start == images.stop:
        return None
    num_rows = len(inputs[name])
    if name == "pixel_values" and "image_grid_thw" in inputs:
        patches = inputs["image_grid_thw"].prod(dim=1).tolist()
        return slice(sum(patches[: images.start]), sum(patches[: images.stop]))
    if num_rows == sum(num_images):
        return images
    if num_rows == len(num_images):
        return samples
    raise SampleError(f"{name} has {num_rows} rows, which are neither those of {sum(num_images)} images nor of samples")
