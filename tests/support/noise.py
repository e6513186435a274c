"""Images of noise that is the same in every process; PIL's own takes a random state that other tests move."""

import numpy as np
from PIL import Image


def noise_image(size: tuple[int, int], seed: int, spread: float = 80) -> Image.Image:
    """Grey RGB image, (width, height), of normal noise around 128 with the standard deviation `spread`."""
    values = np.random.default_rng(seed).normal(128, spread, size[::-1])
    return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
