"""Folder of kept outputs of frozen vision towers, one file an image: whole or not there.

    <folder>/dualspeed_features.json       says that the folder is such
    <folder>/<address>/address.json        what decides the outputs in it: tower, image processor, precision, fields
    <folder>/<address>/<ab>/<ab...>        an image's, by the SHA-256 of its content

A file is a CRC-32 and the tensors as safetensors. It is written under another name and then moved, so that a killed
process leaves none that is half; the CRC tells of those that a machine lost after that.
"""

import errno
import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from dualspeed.errors import FeatureCacheError
from dualspeed.files import sha256_of_json, write_atomic, write_json
from dualspeed.settings.reading import quote

MARK, ADDRESS = "dualspeed_features.json", "address.json"
CONTENT = {"format": 1}
"""Content of MARK; another format would have another number."""
CHECKSUM_BYTES = 4
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def open_folder(root: Path, address: dict[str, Any]) -> Path:
    """Create or find the folder of an address.

    Args:
        address: JSON value of all that decides the outputs; the folder is named by its hash.

    Raises:
        FeatureCacheError: `root` holds something else, or can't be written.
    """
    try:
        check_root(root)
        folder = root / sha256_of_json(address)[:16]
        if not (folder / ADDRESS).is_file():
            write_json(folder / ADDRESS, address)
    except OSError as error:
        raise unusable(root, error) from error
    return folder


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left in the folder of an address; no other process may be writing there."""
    for leftover in folder.glob("*/.*"):
        leftover.unlink(missing_ok=True)


def check_root(root: Path) -> None:
    """Make `root` such a folder, or raise FeatureCacheError for one that is something else."""
    valid = "valid: a new or empty folder, or one that earlier trainings kept features in"
    if root.exists() and not root.is_dir():
        raise FeatureCacheError(f"cache_features: {root} is a file; {valid}")
    mark = root / MARK
    if not mark.is_file():
        others = sorted(path.name for path in root.glob("*") if not path.name.startswith("."))
        if others:
            raise FeatureCacheError(f"cache_features: {root} holds {others[0]}, which is none of its files; {valid}")
        write_json(mark, CONTENT)
        return
    try:
        found = json.loads(mark.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if found != CONTENT:
        raise FeatureCacheError(f"cache_features: {mark} says {quote(found)}, not {CONTENT}; {valid}")


def file_of(folder: Path, digest: str) -> Path:
    """File of an image in the folder of an address."""
    return folder / digest[:2] / digest


def write_states(folder: Path, digest: str, states: dict[str, Tensor]) -> int:
    """Write an image's outputs; number of bytes.

    Raises:
        FeatureCacheError: the disk is full, or the folder can't be written.
    """
    content = safetensors.torch.save({name: values.contiguous().cpu() for name, values in states.items()})
    content = zlib.crc32(content).to_bytes(CHECKSUM_BYTES) + content
    try:
        write_atomic(file_of(folder, digest), content)
    except OSError as error:
        raise unusable(folder.parent, error) from error
    return len(content)


def read_states(folder: Path, digest: str) -> dict[str, Tensor]:
    """Read an image's outputs.

    Raises:
        FeatureCacheError: the file is missing or damaged; a damaged one is removed.
    """
    file = file_of(folder, digest)
    again = "start again, which encodes the image anew"
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise FeatureCacheError(f"cache_features: {file} is missing; {again}") from None
    except OSError as error:
        raise unusable(folder.parent, error) from error
    checksum, content = content[:CHECKSUM_BYTES], content[CHECKSUM_BYTES:]
    if zlib.crc32(content).to_bytes(CHECKSUM_BYTES) != checksum:
        file.unlink(missing_ok=True)
        raise FeatureCacheError(f"cache_features: {file} was damaged and is removed; {again}")
    return safetensors.torch.load(content)


def check_space(folder: Path, needed: float, num_images: int) -> None:
    """Raise FeatureCacheError unless the disk has room for the outputs of `num_images` more, of `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise FeatureCacheError(
            f"cache_features: {folder.parent}: {num_images} images need {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB "
            "are free; valid: a folder on a larger disk, or null"
        )


def unusable(root: Path, error: OSError) -> FeatureCacheError:
    """Error of a folder that can't be read or written; what is in it stays usable."""
    advice = "a folder on a larger disk" if error.errno in FULL else "a folder that can be read and written"
    return FeatureCacheError(
        f"cache_features: {root}: {error.strerror}; what was written whole stays usable; valid: {advice}, or null"
    )
