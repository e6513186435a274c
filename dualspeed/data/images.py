"""Image files: checks before training, with the reason of a failure, and opening.

An image is usable if it decodes completely, has at least MIN_SIDE pixels on each side, an aspect ratio of at most
MAX_ASPECT_RATIO and no more pixels than the limit, and if its pixel mode has an RGB form (dualspeed.data.rgb). Of an
animation, the first frame counts. `inspect_image` reports what is converted.
"""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from dualspeed.data.rgb import conversion_of, to_rgb
from dualspeed.errors import ImageError
from dualspeed.settings.recipe import MAX_IMAGE_PIXELS

MIN_SIDE = 2
"""Fewest pixels on a side; an image of one pixel or one line is a placeholder or an accident."""
MAX_ASPECT_RATIO = 100
"""Longest side over shortest. Longer strips leave no row of patches in LLaVA-NeXT's grid, and LLaVA-1.5's processor
enlarges them to 100 MB."""
SUFFIXES = (".jpg", ".png", ".gif", ".jpeg")
"""Suffixes that are tried for a missing image: LLaVA's annotations name all images of OCR-VQA .jpg, but the downloaded
files keep their own suffixes."""

# Pillow's own limit warns at one size and raises an error at twice that; ours (`max_image_pixels`) is checked here.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True, slots=True)
class ImageReport:
    """Result of `inspect_image`: the reason why the image is unusable, or its mode and size."""

    path: str
    reason: str | None = None
    """None for a usable image."""
    detail: str = ""
    mode: str = ""
    """Pixel mode in the file, and what else differs from plain RGB; all of it is converted when the image is opened."""
    height: int = 0
    """Pixels, of the upright image."""
    width: int = 0
    """Pixels, of the upright image."""
    checksum: str = ""
    """SHA-256 of the file."""


def find_image(path: str | Path) -> Path:
    """Return the path of the image that annotations name `path`: itself, or the one file of another suffix."""
    path = Path(path)
    try:
        if path.exists():
            return path
        others = [other for suffix in SUFFIXES if (other := path.with_suffix(suffix)).exists()]
    except (OSError, ValueError):  # a name that no file can have; `inspect_image` says why
        return path
    return others[0] if len(others) == 1 else path


def inspect_image(path: str | Path, max_pixels: int = MAX_IMAGE_PIXELS) -> ImageReport:
    """Decode the image at `path` completely and report on it; an unusable file raises no error."""
    path = str(path)
    try:
        content = Path(path).read_bytes() if Path(path).is_file() else None
    except (OSError, ValueError) as error:
        return ImageReport(path, "cannot be read", detail=getattr(error, "strerror", None) or str(error))
    if content is None:
        return ImageReport(path, "missing")
    if not content:
        return ImageReport(path, "zero bytes")
    try:
        with Image.open(io.BytesIO(content)) as image:
            return _inspect(path, image, max_pixels, hashlib.sha256(content).hexdigest())
    except UnidentifiedImageError:
        return ImageReport(path, "not an image")
    except Exception as error:
        # Decoders raise OSError, ValueError, SyntaxError, struct.error and more; each means an unusable image.
        return ImageReport(path, "truncated or damaged", detail=f"{type(error).__name__}: {error}")


def _inspect(path: str, image: Image.Image, max_pixels: int, checksum: str) -> ImageReport:
    if image.width * image.height > max_pixels:
        size = f"{image.width} x {image.height} pixels; max_image_pixels is {max_pixels}"
        return ImageReport(path, "too large", detail=size)
    conversion = conversion_of(image)
    if conversion is None:
        return ImageReport(path, "pixel mode without an RGB form", detail=image.mode)
    width, height = upright_rgb(image).size
    if min(width, height) < MIN_SIDE:
        return ImageReport(path, "too small", detail=f"{width} x {height} pixels; at least {MIN_SIDE} on a side")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        return ImageReport(path, "too narrow", detail=f"{width} x {height} pixels; at most 1 : {MAX_ASPECT_RATIO}")
    return ImageReport(path, mode=conversion, height=height, width=width, checksum=checksum)


def upright_rgb(image: Image.Image) -> Image.Image:
    """Decode an opened image: its first frame, turned as EXIF says, in RGB."""
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return to_rgb(image)


def open_image(path: str | Path) -> Image.Image:
    """Open the image at `path`, upright and in RGB; ImageError names a file that can't be opened.

    For a plain RGB image these are the two steps of transformers' own loader, so a stock processor that is given the
    path sees the same pixels.
    """
    try:
        with Image.open(path) as image:
            return upright_rgb(image)
    except Exception as error:
        raise ImageError(f"image {path}: {inspect_image(path).reason or error}") from error
