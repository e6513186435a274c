"""Image files: checks before training, with the reason of a failure, and opening.

An image is usable if it decodes completely, is a single still picture with at least MIN_SIDE pixels on each side and an
aspect ratio of at most MAX_ASPECT_RATIO, and its pixel mode converts to RGB. Grey, palette, CMYK and transparent images
are converted; `inspect_image` reports their mode.
"""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from dualspeed.errors import ImageError

MIN_SIDE = 2
"""Fewest pixels on a side; an image of one pixel or one line is a placeholder or an accident."""
MAX_ASPECT_RATIO = 100
"""Longest side over shortest. Longer strips leave no row of patches in LLaVA-NeXT's grid, and LLaVA-1.5's processor
enlarges them to 100 MB."""
CONVERTIBLE_MODES = ("1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr")
"""Pixel modes that convert to RGB without loss of range; 16-bit and float modes would be clipped."""
SUFFIXES = (".jpg", ".png", ".gif", ".jpeg")
"""Suffixes that are tried for a missing image: LLaVA's annotations name all images of OCR-VQA .jpg, but the downloaded
files keep their own suffixes."""


@dataclass(frozen=True, slots=True)
class ImageReport:
    """Result of `inspect_image`: the reason why the image is unusable, or its mode and size."""

    path: str
    reason: str | None = None
    """None for a usable image."""
    detail: str = ""
    mode: str = ""
    """Pixel mode in the file; other modes than RGB are converted when the image is opened."""
    height: int = 0
    """Pixels, of the upright image."""
    width: int = 0
    """Pixels, of the upright image."""


def find_image(path: str | Path) -> Path:
    """Return the path of the image that annotations name `path`: itself, or the same name with another suffix."""
    path = Path(path)
    if path.exists():
        return path
    others = (path.with_suffix(suffix) for suffix in SUFFIXES)
    return next((other for other in others if other.exists()), path)


def check_image(path: str | Path) -> str | None:
    """Return the reason why the image at `path` is unusable, or None."""
    return inspect_image(path).reason


def inspect_image(path: str | Path) -> ImageReport:
    """Decode the image at `path` completely and report on it; an unusable file raises no error."""
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
        # Decoders raise OSError, ValueError, SyntaxError, struct.error and more; each means an unusable image.
        return ImageReport(path, "truncated or damaged", detail=f"{type(error).__name__}: {error}")


def _inspect(path: str, image: Image.Image) -> ImageReport:
    # Cameras write multi-picture JPEGs (MPO): one photograph with previews.
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
    """Open the image at `path`, upright and in RGB; ImageError names a file that can't be opened.

    These are the two steps of transformers' own loader, so a stock processor that is given the path sees the same
    pixels.
    """
    try:
        with Image.open(path) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:
        raise ImageError(f"image {path}: {inspect_image(path).reason or error}") from error
