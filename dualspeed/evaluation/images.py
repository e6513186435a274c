"""Checks of a benchmark's images before a model is loaded."""

import os
from pathlib import Path

from PIL import Image

from dualspeed.benchmarks import Question
from dualspeed.data.images import inspect_image, open_image
from dualspeed.errors import BenchmarkError
from dualspeed.files import sha256_of_file, sha256_of_json


def images_checksum(name: str, questions: list[Question]) -> str:
    """Digest of names and content of a benchmark's images.

    Raises:
        BenchmarkError: images are missing; the message lists the first ones.
    """
    images = sorted({question.image for question in questions if question.image is not None})
    # Path.is_file would fail at a name that is too long for a file.
    missing = [str(image) for image in images if not os.path.isfile(image)]
    if missing:
        raise BenchmarkError(f"{name}: {len(missing)} of {len(images)} images are missing: {', '.join(missing[:5])}")
    return sha256_of_json([(image.name, sha256_of_file(image)) for image in images])


def image_as_asked(path: Path) -> Image.Image:
    """Image in RGB as models get it, upright and on white, which pages show beside the question."""
    return open_image(path)


def check_images(questions: list[Question]) -> dict[Path, tuple[int, int]]:
    """(height, width) of the questions' images; each is decoded, so that a bad one stops a run at its start.

    Raises:
        BenchmarkError: unusable images; the message lists the first ones with the reason.
    """
    images = sorted({question.image for question in questions if question.image is not None})
    reports = {image: inspect_image(image) for image in images}
    unusable = {image: report for image, report in reports.items() if report.reason}
    bad = [f"{image} ({report.reason}{report.detail and f', {report.detail}'})" for image, report in unusable.items()]
    if bad:
        raise BenchmarkError(f"{len(bad)} of {len(images)} images cannot be used: {', '.join(bad[:5])}")
    return {image: (report.height, report.width) for image, report in reports.items()}
