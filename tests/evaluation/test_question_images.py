"""Benchmarks' images: the same rules as for training, and another checksum for another content."""

import pytest
from PIL import Image

from dualspeed.benchmarks import Question
from dualspeed.errors import BenchmarkError
from dualspeed.evaluation.images import check_images, image_as_asked, images_checksum
from tests.support.samples import write_image


def question(path):
    return Question(question_id="1", official_id=1, image=path, prompt="What is it?")


def test_other_content_of_the_same_size_has_another_checksum(tmp_path):
    """State folders of answers are named by it, so answers to other pictures are not taken for these."""
    checksums = []
    for colour in ("red", "blue", "red"):
        Image.new("RGB", (20, 20), colour).save(tmp_path / "a.bmp")
        checksums.append(images_checksum("gqa", [question(tmp_path / "a.bmp")]))
    assert checksums[0] == checksums[2] != checksums[1]


def test_an_unusable_image_is_named_with_the_reason(tmp_path):
    write_image(tmp_path / "a.png", "too large")
    with pytest.raises(
        BenchmarkError, match=r"1 of 1 images .*a\.png \(too large, 30000 x 6000 pixels; max_image_pixels"
    ):
        check_images([question(tmp_path / "a.png")])


def test_pages_show_images_as_models_get_them(tmp_path):
    Image.new("RGBA", (20, 30), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert check_images([question(tmp_path / "a.png")]) == {tmp_path / "a.png": (30, 20)}
    assert image_as_asked(tmp_path / "a.png").getcolors() == [(600, (255, 255, 255))]
