"""Samples of a recipe in their order: each entry's record or problem, and the images that the entry itself holds."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dualspeed.data.annotations import count_entries, read_entries, suffix_of
from dualspeed.data.conversations import Problem, read_record
from dualspeed.data.media import content_of
from dualspeed.data.row_sources import OpenedSource, open_source
from dualspeed.data.rows import read_row
from dualspeed.errors import AnnotationsError
from dualspeed.settings.recipe import DataRecipe


@dataclass(frozen=True, slots=True)
class Sample:
    """One entry of the data, its images not opened yet."""

    record: dict[str, Any] | Problem
    """{id, messages, images}, the images as paths."""
    source: str
    """Name of the source that it comes from."""
    contents: dict[str, bytes] = field(default_factory=dict)
    """Image path -> file content that belongs there, of images in the entry itself."""


@dataclass(frozen=True)
class SampleStream:
    """All samples of a recipe, to be read once."""

    samples: Iterator[Sample]
    num_total: int | None
    """Their number; None: not known before they are read."""
    sources: dict[str, str | None] = field(default_factory=dict)
    """Name of each source of `data` -> its commit on the Hub, if it comes from there."""


def open_samples(recipe: DataRecipe, own_images: Path) -> SampleStream:
    """Open the data of a recipe.

    Args:
        own_images: folder for the images in rows whose source names no folder of images.

    Raises:
        AnnotationsError: a source can't be read, is empty, or has columns of no format.
        DownloadError: the Hub refuses.
    """
    if recipe.annotations:
        num_total = count_entries(Path(recipe.annotations))
        if not num_total:
            raise AnnotationsError(f"{recipe.annotations}: has no entry; valid: LLaVA conversations as JSON or parquet")
        return SampleStream(annotated_samples(recipe), num_total)
    opened = [open_source(source) for source in recipe.data]
    names = [f"data[{number}] {source.name}" for number, source in enumerate(recipe.data)]
    for name, rows in zip(names, opened, strict=True):
        if rows.num_rows == 0:
            raise no_rows(name)
    counts = [rows.num_rows for rows in opened if rows.num_rows is not None]
    return SampleStream(
        row_samples(recipe, names, opened, own_images),
        sum(counts) if len(counts) == len(opened) else None,
        {name: rows.revision for name, rows in zip(names, opened, strict=True)},
    )


def annotated_samples(recipe: DataRecipe) -> Iterator[Sample]:
    """Yield the samples of LLaVA's annotations."""
    images = Path(recipe.images)
    for entry in read_entries(Path(recipe.annotations)):
        record = read_record(entry, images)
        paths = [] if isinstance(record, Problem) or entry.image is None else record["images"]
        yield Sample(record, recipe.annotations, {path: entry.image for path in paths if entry.image is not None})


def row_samples(recipe: DataRecipe, names: list[str], opened: list[OpenedSource], own_images: Path) -> Iterator[Sample]:
    """Yield the samples of a recipe's sources, one source after another."""
    for name, source, rows in zip(names, recipe.data, opened, strict=True):
        folder, is_empty = recipe.images_of(source), True
        for row in rows.rows:
            is_empty = False
            if isinstance(row.value, json.JSONDecodeError):
                yield Sample(Problem(row.name, row.place, "malformed JSON line", str(row.value)), name)
                continue
            images = None if folder is None else Path(folder)
            record = read_row(row.value, row.name, images, row_format=source.format)
            if isinstance(record, Problem):
                yield Sample(replace(record, file=row.place), name)
                continue
            contents = with_files(record, images or own_images)
            yield Sample(record, name, contents)
        if is_empty:
            raise no_rows(name)


def with_files(record: dict[str, Any], folder: Path) -> dict[str, bytes]:
    """Put a path in the place of each image that a record holds itself; returns {path: content}.

    The path is that of the content, so that an image which comes twice is there once, and another share of the rows
    finds the same files.
    """
    contents = {}
    for number, source in enumerate(record["images"]):
        if (content := content_of(source)) is not None:
            digest = hashlib.sha256(content).hexdigest()
            path = str(folder / digest[:2] / f"{digest}{suffix_of(content)}")
            record["images"][number], contents[path] = path, content
    return contents


def no_rows(name: str) -> AnnotationsError:
    """Return the error for a source that gives nothing."""
    return AnnotationsError(f"{name}: no row is taken; valid: a source with rows, and a larger share")
