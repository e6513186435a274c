"""Checks of a benchmark's images before a model is loaded."""

from pathlib import Path

from dualspeed.benchmarks import Question
from dualspeed.data.images import inspect_image
from dualspeed.errors import BenchmarkError
from dualspeed.files import sha256_of_json


def images_checksum(name: str, questions: list[Question]) -> str:
    """Digest of names and sizes in bytes of a benchmark's images: cheap, and different for regenerated images.

    Raises:
        BenchmarkError: images are missing; the message lists the first ones.
    """
    images = sorted({question.image for question in questions if question.image is not None})
    missing = [str(image) for image in images if not image.is_file()]
    if missing:
        raise BenchmarkError(f"{name}: {len(missing)} of {len(images)} images are missing: {', '.join(missing[:5])}")
    return sha256_of_json([(image.name, image.stat().st_size) for image in images])


def check_images(questions: list[Question]) -> dict[Path, tuple[int, int]]:
    """(height, width) of the questions' images; each is decoded, so that a bad one stops a run at its start.

    Raises:
        BenchmarkError: unusable images; the message lists the first ones with the reason.
    """
    images = sorted({question.image for question in questions if question.image is not None})
    reports = {image: inspect_image(image) for image in images}
    bad = [f"{image} ({report.reason})" for image, report in reports.items() if report.reason]
    if bad:
        raise BenchmarkError(f"{len(bad)} of {len(images)} images cannot be used: {', '.join(bad[:5])}")
    return {image: (report.height, report.width) for image, report in reports.items()}
