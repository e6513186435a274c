"""An image is the same, whichever way a row holds it: a path, bytes, {bytes, path}, a PIL image."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from dualspeed.data.images import inspect_image, open_image
from dualspeed.errors import ImageError
from tests.support.samples import BAD_IMAGES, write_image


def encoded(image, kind, **options):
    """Content of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def noise(mode="RGB"):
    return Image.effect_noise((40, 30), 80).convert(mode)


def turned():
    """Exif data that asks for a turn by 90 degrees."""
    exif = noise().getexif()
    exif[0x0112] = 6
    return exif


def see_through():
    image = noise("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def wide():
    return Image.fromarray((np.arange(1200, dtype=np.uint16) * 50).reshape(30, 40))


def colours():
    """An ICC profile that exchanges red and blue."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = content.index(b"rXYZ"), content.index(b"bXYZ")
    content[red : red + 4], content[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(content)


FILES = {
    "RGB": lambda: encoded(noise(), "PNG"),
    "grey": lambda: encoded(noise("L"), "PNG"),
    "CMYK": lambda: encoded(noise("CMYK"), "JPEG"),
    "transparent": lambda: encoded(see_through(), "PNG"),
    "transparent palette": lambda: encoded(see_through().quantize(8), "GIF"),
    "transparent colour": lambda: encoded(Image.new("RGB", (40, 30), (7, 7, 7)), "PNG", transparency=(7, 7, 7)),
    "EXIF": lambda: encoded(noise(), "JPEG", exif=turned()),
    "EXIF in PNG": lambda: encoded(see_through(), "PNG", exif=turned()),
    "EXIF in TIFF": lambda: encoded(noise(), "TIFF", exif=turned()),
    "16 bits": lambda: encoded(wide(), "PNG"),
    "16 bits in PGM": lambda: encoded(wide(), "PPM"),
    "profile": lambda: encoded(Image.new("RGB", (40, 30), (250, 10, 10)), "JPEG", icc_profile=colours()),
    "animation": lambda: encoded(noise(), "GIF", save_all=True, append_images=[noise("L")]),
}


@pytest.mark.parametrize("name", FILES)
def test_every_source_gives_the_same_pixels_and_report(name, tmp_path):
    content = FILES[name]()
    (tmp_path / "image").write_bytes(content)
    expected, report = open_image(tmp_path / "image"), inspect_image(tmp_path / "image")
    assert expected.mode == "RGB" and report.reason is None
    opened = Image.open(io.BytesIO(content))
    if name == "animation":
        opened.seek(1)
    for source in (content, {"bytes": content, "path": "x"}, {"bytes": None, "path": str(tmp_path / "image")}, opened):
        image, found = open_image(source), inspect_image(source)
        assert (image.mode, image.size, image.tobytes()) == ("RGB", expected.size, expected.tobytes())
        assert (found.reason, found.width, found.height) == (None, report.width, report.height)


@pytest.mark.parametrize(
    "name", [name for name in FILES if name != "EXIF in TIFF"]
)  # Pillow itself turns those at once
def test_a_pil_image_is_left_as_it_was(name):
    image = Image.open(io.BytesIO(FILES[name]()))
    image.load()
    if name == "animation":
        image.seek(1)
    before = image.mode, image.size, image.tobytes(), dict(image.info), image.tell()
    opened = open_image(image)
    opened.paste("black", (0, 0, *opened.size))
    inspect_image(image)
    assert (image.mode, image.size, image.tobytes(), dict(image.info), image.tell()) == before


@pytest.mark.parametrize("kind", [kind for kind in BAD_IMAGES if kind != "missing"])
def test_bad_bytes_have_the_reasons_of_bad_files(kind, tmp_path):
    write_image(tmp_path / "image.png", kind)
    content = (tmp_path / "image.png").read_bytes()
    assert inspect_image(content).reason == inspect_image({"bytes": content, "path": None}).reason == BAD_IMAGES[kind]


def test_an_image_in_a_row_that_cannot_be_opened_says_so(tmp_path):
    with pytest.raises(ImageError, match="image in the row: not an image"):
        open_image(b"<html>")
    torn = Image.open(io.BytesIO(FILES["RGB"]()[:-300]))
    with pytest.raises(ImageError, match="image in the row: truncated or damaged"):
        open_image(torn)
    with pytest.raises(ImageError, match="image in the row: pixel mode without an RGB form"):
        open_image(Image.new("F", (4, 4)))
    assert inspect_image(Image.new("RGB", (1, 1))).reason == "too small"
