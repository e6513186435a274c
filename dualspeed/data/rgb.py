"""Conversion of images to RGB, by the rule that a browser shows them by.

- Transparency (RGBA, LA, palette and colour-key transparency) is composited on white.
- 16-bit grey is scaled to 8 bits.
- Colours with an ICC profile are converted to sRGB; without a readable profile they are taken for sRGB.
- Other 8-bit modes (grey, palette, CMYK, YCbCr, black and white) are converted by Pillow.

32-bit and float images have no known range and no RGB form. A plain RGB image is returned as it is.
"""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

from dualspeed.errors import ImageError

EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
"""Pixel modes that convert to RGB without loss of range."""
SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
PROFILE_MODES = ("L", "RGB", "CMYK")
"""Pixel modes in which colour profiles are applied."""
WHITE = (255, 255, 255)


def conversion_of(image: Image.Image) -> str | None:
    """Return how an opened image differs from plain RGB, for a list of what was converted; None: it has no RGB form.

    RGB alone means that nothing is converted.
    """
    if image.mode not in EIGHT_BIT_MODES and not is_sixteen_bit(image):
        return None
    notes = [image.mode]
    # PNG and GIF name a transparent colour; the modes with an alpha channel say so themselves.
    if "transparency" in image.info and image.mode in ("1", "L", "P", "RGB", *SIXTEEN_BIT_MODES):
        notes.append("a transparent colour")
    if changes_colours(image):
        notes.append("a colour profile")
    # Cameras write multi-picture JPEGs (MPO): one photograph with previews.
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        notes.append("several frames")
    return " with ".join([notes[0], " and ".join(notes[1:])]) if len(notes) > 1 else notes[0]


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a decoded image in RGB; a plain RGB image is returned itself.

    Raises:
        ImageError: the image has no RGB form.
    """
    if is_sixteen_bit(image):
        image = eight_bits(image)
    if image.mode not in EIGHT_BIT_MODES:
        raise ImageError(f"pixel mode {image.mode} has no RGB form")
    profile = image.info.get("icc_profile")
    if not image.has_transparency_data:
        return in_srgb(image, profile)
    whole = image if image.mode in ("LA", "RGBA") else image.convert("RGBA")
    opaque = in_srgb(whole.convert("L" if whole.mode == "LA" else "RGB"), profile)
    canvas = Image.new("RGB", image.size, WHITE)
    canvas.paste(opaque, mask=whole.getchannel("A"))
    return canvas


def is_sixteen_bit(image: Image.Image) -> bool:
    """True for 16-bit grey; Pillow holds that of PGM files in 32 bits, scaled to 65535."""
    return image.mode in SIXTEEN_BIT_MODES or (image.mode == "I" and image.format == "PPM")


def eight_bits(image: Image.Image) -> Image.Image:
    """Return 16-bit grey as 8-bit grey: 0 stays 0 and 65535 becomes 255. Its transparent colour becomes alpha."""
    values = np.asarray(image).astype(np.uint32)
    scaled = Image.fromarray(((np.clip(values, 0, 65535) + 128) // 257).astype(np.uint8))
    scaled.info = {key: value for key, value in image.info.items() if key != "transparency"}
    if isinstance(key := image.info.get("transparency"), int):
        scaled.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return scaled


def in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Return an opaque image in RGB, its colours converted from the ICC profile to sRGB."""
    if image.mode not in PROFILE_MODES:
        image = image.convert("L" if image.mode == "1" else "RGB")
    transform = transform_of(profile, image.mode) if profile else None
    if transform is not None:
        converted = transform.apply(image)
        converted.info.pop("icc_profile", None)
        return converted
    return image if image.mode == "RGB" else image.convert("RGB")


def changes_colours(image: Image.Image) -> bool:
    """True if an opened image has a profile that conversion applies."""
    profile = image.info.get("icc_profile")
    mode = {"LA": "L", "1": "L"}.get(image.mode, image.mode)
    mode = "L" if is_sixteen_bit(image) else mode if mode in PROFILE_MODES else "RGB"
    return bool(profile) and transform_of(profile, mode) is not None


@lru_cache(maxsize=64)
def transform_of(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the conversion from an ICC profile to sRGB; None if it changes nothing, or the profile doesn't apply.

    A profile that is sRGB itself, by whatever name, changes each of a grid of colours by at most one step, and is left
    out: rounding must not change images that are sRGB already.
    """
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    grid = sample_colours(mode)
    before, after = (np.asarray(image).astype(int) for image in (grid.convert("RGB"), transform.apply(grid)))
    return transform if np.abs(before - after).max() > 1 else None


def sample_colours(mode: str) -> Image.Image:
    """Return an image of colours from all over a pixel mode's range, (1, N)."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    steps = np.linspace(0, 255, 9 if mode == "RGB" else 5).astype(np.uint8)
    colours = np.stack(np.meshgrid(*[steps] * len(mode), indexing="ij"), axis=-1)
    return Image.fromarray(colours.reshape(1, -1, len(mode)), mode=mode)
