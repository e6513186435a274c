"""Digest of an image's content, by which what is computed of it is found again."""

import hashlib
from pathlib import Path

from PIL import Image

from dualspeed.data.images import ImageSource, first_frame, open_image, upright_rgb, without_dict


def image_digest(source: ImageSource) -> str:
    """SHA-256 of an image: of its file's content, or of the upright pixels of a PIL image.

    Raises:
        ImageError: the file can't be read.
    """
    source = without_dict(source)
    if isinstance(source, Image.Image):
        image = upright_rgb(first_frame(source))
        return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
    try:
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError:
        open_image(source)  # says what is wrong
        raise
    return hashlib.sha256(content).hexdigest()
