"""Unpacking of archives (zip, tar and compressed tar) that stays inside the target folder.

Every member is written, whatever lies in its place: a file of its name and size may hold something else. Each appears
complete or not at all, and a run that was killed is repeated. A path out of the folder, a link, a device, or a path
that comes twice raises an error: no publisher of images needs one. Zip archives are checked before anything is
written, tar archives member by member.
"""

import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from dualspeed.errors import ArchiveError


def unpack(archive: Path, folder: Path, on_file: Callable[[int], object] = lambda count: None) -> list[str]:
    """Write the members of `archive` to `folder`; returns their paths below it.

    Args:
        on_file: called with 1 for each member that is complete.

    Raises:
        ArchiveError: the file is no archive or damaged, a member would leave the folder, or the disk is full.
    """
    written: set[str] = set()
    part = folder / f".unpacking-{archive.name}"
    try:
        for name, content in _members(archive, folder):
            path = str(_checked(archive, name))
            if path in written:
                raise ArchiveError(f"{archive}: two members are written to {path!r}; valid: one")
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with content() as source, open(part, "wb") as file:
                shutil.copyfileobj(source, file)
            part.replace(target)
            written.add(path)
            on_file(1)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, NotImplementedError) as error:
        raise ArchiveError(f"{archive}: damaged, or no archive: {error}") from None
    except OSError as error:
        raise ArchiveError(f"{archive}: cannot be unpacked to {folder}: {error}") from error
    except Exception as error:  # zlib.error, lzma.LZMAError and others of the decompressors on damaged data
        if isinstance(error, ArchiveError):
            raise
        raise ArchiveError(f"{archive}: damaged: {type(error).__name__}: {error}") from None
    finally:
        part.unlink(missing_ok=True)
    return sorted(written)


def _members(archive: Path, folder: Path) -> Iterator[tuple[str, Callable[[], IO[bytes]]]]:
    """Yield (name, opener) of each file in the archive."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            members = [member for member in zipped.infolist() if not member.is_dir()]
            for member in members:
                _checked(archive, member.filename)
                if stat.S_ISLNK(member.external_attr >> 16):
                    raise ArchiveError(f"{archive}: {member.filename!r} is a link or a device; refused")
            _check_space(archive, folder, sum(member.file_size for member in members))
            for member in members:
                yield member.filename, partial(zipped.open, member)
        return
    with tarfile.open(archive, "r:*") as tarred:
        for entry in tarred:
            if entry.isfile():
                # extractfile returns None only for members that are no files.
                yield entry.name, partial(tarred.extractfile, entry)  # type: ignore[misc]
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
