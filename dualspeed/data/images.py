"""Image files: which can be trained on, why the others cannot, and how one is opened.

An image is usable if it decodes to its end, is one still picture of at least MIN_SIDE pixels on each side and at most
MAX_ASPECT_RATIO times as long as wide, and its pixel mode has an RGB form. Grey, palette, CMYK and transparent images
are converted; `inspect_image` says from what.
"""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from dualspeed.errors import ImageError

MIN_SIDE = 2
"""Fewest pixels on a side: a single pixel or a line of them shows nothing, and is a placeholder or an accident."""

MAX_ASPECT_RATIO = 100
"""Longer strips leave no row of patches in LLaVA-NeXT's grid, and LLaVA-1.5's processor blows them up to 100 MB."""

CONVERTIBLE_MODES = ("1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr")
"""Pixel modes that convert to RGB without loss of range; 16-bit and float modes would be clipped."""


SUFFIXES = (".jpg", ".png", ".gif", ".jpeg")
"""What an image may be called instead: LLaVA's annotations call all of OCR-VQA's .jpg, its downloads don't."""


@dataclass(frozen=True, slots=True)
class ImageReport:
    """What `inspect_image` found: the reason why the image is unusable, or its mode and size."""

    path: str
    reason: str | None = None
    """None for a usable image."""
    detail: str = ""
    mode: str = ""
    """Pixel mode in the file; anything but RGB is converted when the image is opened."""
    height: int = 0
    width: int = 0


def find_image(path: str | Path) -> Path:
    """Where the image that annotations call `path` lies: there, or beside it under another suffix."""
    path = Path(path)
    if path.exists():
        return path
    others = (path.with_suffix(suffix) for suffix in SUFFIXES)
    return next((other for other in others if other.exists()), path)


def check_image(path: str | Path) -> str | None:
    """Why the image at `path` cannot be used, or None if it can."""
    return inspect_image(path).reason


def inspect_image(path: str | Path) -> ImageReport:
    """Decode the image at `path` to its end and report on it; a bad file is a report, never an error."""
    path = str(path)
    if not Path(path).is_file():
        return ImageReport(path, "missing")
    if Path(path).stat().st_size == 0:
        return ImageReport(path, "zero bytes")
    try:
        with Image.open(path) as image:
            return _inspect(path, image)
    except UnidentifiedImageError:
        return ImageReport(path, "not an image")
    except Image.DecompressionBombError as error:
        return ImageReport(path, "too large", detail=str(error))
    except Exception as error:
        # Decoders raise OSError, ValueError, SyntaxError, struct.error and more: whichever it is, the image is useless.
        return ImageReport(path, "truncated or damaged", detail=f"{type(error).__name__}: {error}")


def _inspect(path: str, image: Image.Image) -> ImageReport:
    # A multi-picture JPEG, as cameras write them, is one photograph with previews.
    num_frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if num_frames > 1:
        return ImageReport(path, "animated", detail=f"{num_frames} frames")
    if image.mode != "RGB" and image.mode not in CONVERTIBLE_MODES:
        return ImageReport(path, "pixel mode without an RGB form", detail=image.mode)
    mode = image.mode
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        return ImageReport(path, "too small", detail=f"{width} x {height} pixels; at least {MIN_SIDE} on a side")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        return ImageReport(path, "too narrow", detail=f"{width} x {height} pixels; at most 1 : {MAX_ASPECT_RATIO}")
    return ImageReport(path, mode=mode, height=height, width=width)


def open_image(path: str | Path) -> Image.Image:
    """The image at `path`, upright and in RGB; ImageError names the file if it cannot be opened.

    The same two steps as transformers' own loader, so that a stock processor given the path sees the same pixels.
    """
    try:
        with Image.open(path) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:
        raise ImageError(f"image {path}: {inspect_image(path).reason or error}") from error
