"""Unpacking of archives (zip, tar and compressed tar) that stays inside the target folder and resumes after a kill.

Members that exist with the right size are skipped. A path out of the folder, a link or a device raises an error: no
publisher of images needs one. Zip archives are checked before anything is written, tar archives member by member.
"""

import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from dualspeed.errors import ArchiveError


def unpack(archive: Path, folder: Path, on_file: Callable[[int], object] = lambda count: None) -> int:
    """Write the members of `archive` to `folder`; returns their number.

    Args:
        on_file: called with 1 for each member that is complete.

    Raises:
        ArchiveError: the file is no archive or damaged, a member would leave the folder, or the disk is full.
    """
    num_files = 0
    try:
        for name, size, content in _members(archive, folder):
            target = folder / _checked(archive, name)
            if not (target.is_file() and target.stat().st_size == size):
                target.parent.mkdir(parents=True, exist_ok=True)
                with content() as source, open(target, "wb") as file:
                    shutil.copyfileobj(source, file)
            num_files += 1
            on_file(1)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, NotImplementedError) as error:
        raise ArchiveError(f"{archive}: damaged, or no archive: {error}") from None
    except OSError as error:
        raise ArchiveError(f"{archive}: cannot be unpacked to {folder}: {error}") from error
    except Exception as error:  # zlib.error, lzma.LZMAError and others of the decompressors on damaged data
        if isinstance(error, ArchiveError):
            raise
        raise ArchiveError(f"{archive}: damaged: {type(error).__name__}: {error}") from None
    return num_files


def _members(archive: Path, folder: Path) -> Iterator[tuple[str, int, Callable[[], IO[bytes]]]]:
    """Yield (name, size in bytes, opener) of each file in the archive."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            members = [member for member in zipped.infolist() if not member.is_dir()]
            for member in members:
                _checked(archive, member.filename)
            _check_space(archive, folder, sum(member.file_size for member in members))
            for member in members:
                yield member.filename, member.file_size, partial(zipped.open, member)
        return
    with tarfile.open(archive, "r:*") as tarred:
        for entry in tarred:
            if entry.isfile():
                # extractfile returns None only for members that are no files.
                yield entry.name, entry.size, partial(tarred.extractfile, entry)  # type: ignore[misc]
            elif not entry.isdir():
                raise ArchiveError(f"{archive}: {entry.name!r} is a link or a device; refused")


def _checked(archive: Path, name: str) -> PurePosixPath:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in name.split("/")[0]:
        raise ArchiveError(f"{archive}: {name!r} leads out of the folder; refused")
    return path


def _check_space(archive: Path, folder: Path, needed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if needed > free else 0
    if needed - there > free:
        raise ArchiveError(
            f"{folder}: {needed / 1e9:.1f} GB are needed for {archive.name} and the disk has {free / 1e9:.1f} GB left"
        )
