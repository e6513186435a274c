"""Pixel values by table: what an image processor makes of each value that a byte can have.

Rescaling and normalising are a third of what CLIP's processor takes of a CPU. Looked up they take a fifth of that, and
come out the same bit for bit, since the table is what the processor's own two functions make of the 256 values.
"""

from typing import Any

import numpy as np
import torch
from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil, ProcessorMixin

TABLED = (CLIPImageProcessorPil, LlavaImageProcessorPil)
"""Those whose last two steps are rescaling and normalising, one (3, H, W) array an image."""


def leaves_bytes(processor: ProcessorMixin) -> dict[str, Any]:
    """Arguments with which the processor leaves pixels as bytes for `pixel_values`; none if it must finish itself."""
    image_processor = processor.image_processor
    if type(image_processor) in TABLED and image_processor.do_rescale and image_processor.do_normalize:
        return {"do_rescale": False, "do_normalize": False}
    return {}


def pixel_values(processor: ProcessorMixin, pictures: list[np.ndarray]) -> torch.Tensor:
    """(images, 3, H, W) float32 of what a processor made of pictures with `leaves_bytes`."""
    image_processor = processor.image_processor
    if all(picture.dtype == np.uint8 for picture in pictures):
        table = finish(image_processor, np.tile(np.arange(256, dtype=np.uint8), (3, 1, 1)))[:, 0]
        values = np.empty((len(pictures), *pictures[0].shape), dtype=table.dtype)
        for picture, target in zip(pictures, values, strict=True):
            for channel in range(3):
                np.take(table[channel], picture[channel], out=target[channel])
        return torch.from_numpy(values)
    return torch.from_numpy(np.stack([finish(image_processor, picture) for picture in pictures]))


def finish(image_processor: CLIPImageProcessorPil, picture: np.ndarray) -> np.ndarray:
    """The processor's own two last steps on a (3, H, W) array."""
    rescaled = image_processor.rescale(picture, image_processor.rescale_factor)
    return image_processor.normalize(rescaled, image_processor.image_mean, image_processor.image_std)
