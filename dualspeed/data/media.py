"""Images as rows hold them, and whatever else in a row is a picture, a film or a sound.

A source of an image is a path, the content of a file (bytes), {bytes, path} as `datasets` stores it, or a PIL image.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from dualspeed.data.annotations import MISNAMED_IMAGES, UNREAD_MEDIA, suffix_of
from dualspeed.data.conversations import located
from dualspeed.data.images import ImageSource
from dualspeed.errors import RecordError
from dualspeed.settings.reading import quote

IMAGE_COLUMNS = ("images", "image")
SOURCES = "a path, bytes, {bytes, path} or a PIL image"
DEPTH = 4
"""Levels of a value that are searched for pictures."""


def is_empty(value: Any) -> bool:
    """True for None and for text, bytes and containers without content."""
    return value is None or (isinstance(value, str | bytes | list | tuple | Mapping) and len(value) == 0)


def as_list(value: Any) -> list[Any]:
    """Return a column's images: none, one or several."""
    return [] if is_empty(value) else list(value) if isinstance(value, list | tuple) else [value]


def read_sources(row: Mapping[Any, Any], folder: Path | None) -> list[ImageSource]:
    """Return the images of a row's column `images` or `image`."""
    given = [name for name in IMAGE_COLUMNS if not is_empty(row.get(name))]
    if len(given) > 1:
        raise RecordError("images under two keys", "images and image; valid: one of them")
    return [read_source(value, folder) for name in given for value in as_list(row[name])]


def read_source(value: Any, folder: Path | None) -> ImageSource:
    """Return an image's source, a path with the folder that it starts from; RecordError if it is none.

    Args:
        folder: None: paths are taken as they are.
    """
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, os.PathLike) and isinstance(os.fspath(value), str):
        value = os.fspath(value)
    if isinstance(value, str) and value:
        return located(value, folder)
    if isinstance(value, bytes | bytearray | memoryview):
        return read_content(value)
    if isinstance(value, Mapping):
        content, path = value.get("bytes"), value.get("path")
        if isinstance(content, str):
            raise RecordError("image is base64 text", "text under `bytes`; valid: the file's bytes, or its path")
        if isinstance(content, bytes | bytearray | memoryview):
            return {"bytes": read_content(content), "path": path if isinstance(path, str) else None}
        if content is None and isinstance(path, str) and path:
            return located(path, folder)
    raise RecordError("image is not one", f"{described(value)}; valid: {SOURCES}")


def read_content(value: bytes | bytearray | memoryview) -> bytes:
    """Return the content of an image's file."""
    if not (content := bytes(value)):
        raise RecordError("image is not one", f"0 bytes; valid: {SOURCES}")
    return content


def content_of(source: ImageSource) -> bytes | None:
    """Return the file content that a source holds; None for a path and a PIL image."""
    if isinstance(source, dict):
        return source["bytes"]
    return source if isinstance(source, bytes) else None


def check_others(row: Mapping[Any, Any], used: tuple[str, ...], num_images: int, where: str = "column") -> None:
    """Raise RecordError if a part of a row that nobody reads holds pictures, films or sounds, by its name or its value.

    Args:
        used: keys that are read.
        num_images: images of the row; beside them, a text that is named like an image's path says where it came from.
    """
    for key, value in row.items():
        if key in used or is_empty(value):
            continue
        name = str(key).strip().casefold() if isinstance(key, str) else ""
        if name in UNREAD_MEDIA:
            raise RecordError("video or audio", f"{where} {quote(key)}; valid: images alone, under `images` or `image`")
        is_misnamed = name in MISNAMED_IMAGES or name in IMAGE_COLUMNS
        if (is_misnamed and not num_images) or any(is_medium(part) for part in parts_of(value)):
            valid = "valid: `images` or `image`; or leave it out of the dataset (remove_columns)"
            raise RecordError("images under another key", f"{where} {quote(key)}; {valid}")


def parts_of(value: Any, depth: int = DEPTH) -> Iterator[Any]:
    """Yield a value and what it holds."""
    yield value
    if depth and isinstance(value, list | tuple | Mapping):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from parts_of(part, depth - 1)


def is_medium(value: Any) -> bool:
    """True for a picture, a film or a sound by its value: PIL, `datasets`, numpy (H, W, C), or its bytes."""
    if isinstance(value, Mapping):
        is_sound = {"array", "sampling_rate"} <= value.keys()
        return is_sound or {"bytes", "path"} == value.keys()
    if isinstance(value, bytes):
        return suffix_of(value) != ".img"
    is_decoder = type(value).__module__.startswith("torchcodec")
    shape = getattr(value, "shape", ())
    return isinstance(value, Image.Image) or is_decoder or (isinstance(shape, tuple) and len(shape) > 2)


def described(value: Any) -> str:
    """Return a value as problems show it, in few characters."""
    if isinstance(value, bytes | bytearray):
        return f"{len(value)} bytes"
    if isinstance(value, Image.Image):
        return "a PIL image"
    return f"{quote(value)} of type {type(value).__name__}"
