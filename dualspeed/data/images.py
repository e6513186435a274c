"""Images: checks before training, with the reason of a failure, and opening.

An image comes as the path of a file, as a file's content (bytes, or {bytes, path} as `datasets` stores it), or as a PIL
image, which is left as it is. It is usable if it decodes completely, has at least MIN_SIDE pixels on each side, an
aspect ratio of at most MAX_ASPECT_RATIO and no more pixels than the limit, and if its pixel mode has an RGB form
(dualspeed.data.rgb). Of an animation, the first frame counts. `inspect_image` reports what is converted.
"""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from dualspeed.data.rgb import conversion_of, to_rgb
from dualspeed.errors import ImageError
from dualspeed.settings.recipe import MAX_IMAGE_PIXELS

ImageSource = str | Path | bytes | dict[str, Any] | Image.Image
IN_ROW = "in the row"
"""Path that reports and errors name for an image without a file."""
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


def inspect_image(source: ImageSource, max_pixels: int = MAX_IMAGE_PIXELS) -> ImageReport:
    """Decode an image completely and report on it; an unusable one raises no error."""
    source = without_dict(source)
    if isinstance(source, bytes):
        return inspect_content(IN_ROW, source, max_pixels)
    if isinstance(source, Image.Image):
        try:
            image = first_frame(source)
            return _inspect(IN_ROW, image, max_pixels, hashlib.sha256(image.tobytes()).hexdigest())
        except Exception as error:  # as below
            return ImageReport(IN_ROW, "truncated or damaged", detail=f"{type(error).__name__}: {error}")
    path = str(source)
    try:
        content = Path(path).read_bytes() if Path(path).is_file() else None
    except (OSError, ValueError) as error:
        return ImageReport(path, "cannot be read", detail=getattr(error, "strerror", None) or str(error))
    return ImageReport(path, "missing") if content is None else inspect_content(path, content, max_pixels)


def inspect_content(path: str, content: bytes, max_pixels: int) -> ImageReport:
    """Report on the content of a file, which is named `path`."""
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


def open_image(source: ImageSource) -> Image.Image:
    """Open an image, upright and in RGB; ImageError names one that can't be opened.

    For a plain RGB image in a file these are the two steps of transformers' own loader, so a stock processor that is
    given the path sees the same pixels.
    """
    source = without_dict(source)
    try:
        if isinstance(source, Image.Image):
            return upright_rgb(first_frame(source))
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return upright_rgb(image)
    except Exception as error:
        name = IN_ROW if isinstance(source, bytes | Image.Image) else source
        raise ImageError(f"image {name}: {inspect_image(source).reason or error}") from error


def without_dict(source: ImageSource) -> str | Path | bytes | Image.Image:
    """Return the bytes of {bytes, path}, or its path if it has none."""
    if not isinstance(source, dict):
        return source
    return source["path"] if source.get("bytes") is None else source["bytes"]


def first_frame(image: Image.Image) -> Image.Image:
    """Return a copy of a PIL image, of an animation the first frame, which leaves the caller's as it was."""
    place = image.tell() if getattr(image, "n_frames", 1) > 1 else 0
    if place:
        image.seek(0)
    image.load()
    # A copy loses what only the file's class knows: its EXIF, and which modes are 16-bit.
    copied = ImageOps.exif_transpose(image)
    copied.format = image.format
    if place:
        image.seek(place)
    return copied
