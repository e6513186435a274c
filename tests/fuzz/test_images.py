"""Damaged image files: unusable with a reason, or opened in RGB with the size that the check reported."""

import io
import warnings

import pytest
from PIL import Image

from dualspeed.data.images import inspect_image, open_image
from dualspeed.errors import ImageError
from tests.support.mutations import mutated_bytes

KINDS = [
    *[("RGB", "PNG"), ("RGB", "JPEG"), ("RGB", "WEBP"), ("RGB", "BMP"), ("RGB", "TIFF")],
    *[("RGBA", "PNG"), ("LA", "PNG"), ("P", "GIF"), ("1", "PNG"), ("I;16", "PNG"), ("CMYK", "JPEG"), ("F", "TIFF")],
]
SIZES = ("too large", "too small", "too narrow")


def picture(mode, kind):
    """Content of a small image file of a pixel mode, with an EXIF rotation where the format takes one."""
    image = Image.effect_noise((24, 16), 80)
    image = Image.new("I;16", (24, 16), 40_000) if mode == "I;16" else image.convert("RGB").convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}))
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore")
def test_images(fuzz, tmp_path):
    path = tmp_path / "image"

    def check(content):
        path.write_bytes(content)
        with warnings.catch_warnings(action="ignore"):
            report = inspect_image(path)
            if report.reason is None:
                image = open_image(path)
                assert image.mode == "RGB" and image.size == (report.width, report.height)
                return "usable"
            if report.reason not in SIZES:  # a rule of preparation alone
                with pytest.raises(ImageError, match=str(path)):
                    open_image(path)
        return report.reason

    counts = fuzz("images", mutated_bytes([picture(*kind) for kind in KINDS]), check, share=0.1)
    assert {"usable", "truncated or damaged", "not an image"} <= set(counts)
