"""Download of one source of the configuration into its folder: each file is fetched once, checked and unpacked.

Files are fetched in parallel. Each gets a receipt under `<folder>/.download/` once it is complete, checked and
unpacked, and later runs skip files with a receipt. Repositories of the Hub are fetched into the Hub's cache, and the
folder holds links to it.
"""

import json
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from dualspeed.data.fetch import fetch, remote_size
from dualspeed.data.hub import fetch_snapshot, matches
from dualspeed.data.lock import DataLock
from dualspeed.data.unpack import unpack
from dualspeed.errors import DownloadError
from dualspeed.files import sha256_of_file, write_json
from dualspeed.settings.sources import Source, SourceFile

logger = logging.getLogger(__name__)

SPARE = 1 << 30
"""Bytes that a disk keeps free beyond what a download needs."""
MEMBERS_SUFFIX = ".members"


def download(
    name: str, source: Source, lock: DataLock, workers: int = 4, fetch_settings: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Fill the folder of the source `name`, and record its files in `lock`.

    Args:
        workers: files that are fetched at once.
        fetch_settings: arguments of `fetch`: attempts, timeout, wait.

    Returns:
        {revision, files: name -> {size, sha256}}.

    Raises:
        DownloadError: a file can't be fetched, differs from the published one, or the disk is too small.
        LockError: a file differs from what an earlier download recorded.
        ArchiveError: an archive can't be unpacked.
    """
    folder = Path(source.folder)
    if source.existing is not None:
        return link_existing(name, folder, Path(source.existing))
    if folder.is_symlink():
        folder.unlink()  # left from an earlier setting `existing`
    folder.mkdir(parents=True, exist_ok=True)
    if source.kind == "hub":
        entry = download_repository(name, source, lock, workers)
    else:
        entry = {"files": download_files(name, source, lock, workers, fetch_settings or {})}
    lock.record(name, entry)
    logger.info("%s: %d files are in %s", name, len(entry["files"]), folder)
    return entry


def link_existing(name: str, folder: Path, existing: Path) -> dict[str, Any]:
    """Make a source's folder a link to the folder that has its files already; they are neither checked nor locked."""
    if not existing.is_dir():
        raise DownloadError(
            f"downloads.{name}.existing: {existing} is not a folder; valid: one with the source's files"
        )
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        raise DownloadError(f"{folder}: exists and is no link, so it can't be linked to {existing}; move it away")
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.symlink_to(existing.absolute(), target_is_directory=True)
    return {"existing": str(existing), "files": {}}


# Files by URL


def download_files(
    name: str, source: Source, lock: DataLock, workers: int, fetch_settings: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Fetch the files of a source that lists URLs; returns file name -> {size, sha256}."""
    folder = Path(source.folder)
    done = {file.name: receipt for file in source.files if (receipt := read_receipt(folder, file)) is not None}
    for file_name, receipt in done.items():
        lock.check(name, file_name, receipt)
    wanted = [file for file in source.files if file.name not in done]
    expected = {file.name: expectation(name, file, lock) for file in wanted}
    sizes = {
        file.name: expected[file.name].get("size") or (remote_size(file.address) if is_remote(file) else None) or 0
        for file in wanted
    }
    check_space(folder, wanted, sizes)
    bar = tqdm(total=sum(sizes.values()), desc=name, unit="B", unit_scale=True, mininterval=1)

    def obtain(file: SourceFile) -> dict[str, Any]:
        size = sizes[file.name] or None
        return download_file(name, folder, file, expected[file.name], size, lock, bar.update, fetch_settings)

    with bar, ThreadPoolExecutor(workers) as pool:
        futures = {file.name: pool.submit(obtain, file) for file in wanted}
        errors = [error for future in futures.values() if (error := future.exception()) is not None]
    if errors:
        raise errors[0]  # the other files are complete and have their receipts
    return done | {file_name: future.result() for file_name, future in futures.items()}


def download_file(
    name: str,
    folder: Path,
    file: SourceFile,
    expected: dict[str, Any],
    size: int | None,
    lock: DataLock,
    on_bytes: Callable[[int], object],
    fetch_settings: dict[str, Any],
) -> dict[str, Any]:
    """Fetch, check and unpack one file; returns its {size, sha256}."""
    part, there = folder / ".download" / file.name, folder / file.name
    if not is_remote(file):
        path = local_path(file)
    elif is_from_user(folder, file):
        path = there  # put there by the user, or by a run that was killed before it wrote the receipt
        expected = ({"size": size} if size else {}) | expected
    else:
        path = part
        if not part.exists():
            fetch(file.address, part, size, on_bytes, **fetch_settings)
    found = {"size": path.stat().st_size, "sha256": sha256_of_file(path)}
    for key, value in expected.items():
        if found[key] != value:
            if path == part:
                part.unlink()  # complete but wrong: the next run has to fetch all of it
            raise DownloadError(f"{file.url}: {key} is {found[key]}, expected {value}: damaged, or another version")
    lock.check(name, file.name, found)
    put_in_place(path, folder, file, found, is_own=path == part)
    return found


def put_in_place(path: Path, folder: Path, file: SourceFile, found: dict[str, Any], is_own: bool) -> None:
    """Unpack the archive at `path` into the source's folder, or move or link the file to its place; write a receipt.

    Args:
        found: {size, sha256} of the file.
        is_own: True if the file was fetched for this and belongs to nobody else.
    """
    target, receipt = folder / file.name, receipt_path(folder, file)
    receipt.unlink(missing_ok=True)  # until all is in place, the folder may hold some of the old and some of the new
    if file.unpack is not None:
        logger.info("unpacking %s", path)
        bar = tqdm(desc=f"unpacking {path.name}", unit="file", mininterval=1)
        with bar:
            members = unpack(path, folder / file.unpack, bar.update)
        replace_members(folder, file, members)
        if is_own:
            path.unlink()  # the receipt records its content
    elif is_own:
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    elif path != target:
        link(path, target)
    write_json(receipt, found)


def replace_members(folder: Path, file: SourceFile, members: list[str]) -> None:
    """Record what an archive made, and delete what only its earlier version made."""
    record = members_path(folder, file)
    made = {str(PurePosixPath(file.unpack or ".") / member) for member in members}
    before = set(json.loads(record.read_text(encoding="utf-8"))) if record.exists() else set()
    if stale := before - made:
        others = (path for path in record.parent.rglob(f"*{MEMBERS_SUFFIX}") if path != record)
        for path in stale.difference(*(json.loads(other.read_text(encoding="utf-8")) for other in others)):
            (folder / path).unlink(missing_ok=True)
    write_json(record, sorted(made))


def members_path(folder: Path, file: SourceFile) -> Path:
    """Path of the list of files that an archive made, relative to the source's folder."""
    return folder / ".download" / f"{file.name}{MEMBERS_SUFFIX}"


def expectation(name: str, file: SourceFile, lock: DataLock) -> dict[str, Any]:
    """Return {size, sha256} as far as configuration or lock state them; DownloadError if they disagree."""
    stated: dict[str, Any] = {
        key: value for key, value in (("size", file.size), ("sha256", file.sha256)) if value is not None
    }
    if "sha256" in stated:
        stated["sha256"] = stated["sha256"].lower()
    locked = lock.file(name, file.name)
    for key in stated.keys() & locked.keys():
        if stated[key] != locked[key]:
            raise DownloadError(
                f"downloads.{name}, {file.name}: {key} is {stated[key]} in the configuration and {locked[key]} in "
                f"{lock.path}; valid: the same in both, or none in one of them"
            )
    return locked | stated


def check_space(folder: Path, files: list[SourceFile], sizes: dict[str, int]) -> None:
    """Raise DownloadError if the disk can't hold the files and, for archives, their content.

    Photographs don't compress, so the content of an archive is taken to be as large as the archive.
    """
    needed = 0
    for file in files:
        part = folder / ".download" / f"{file.name}.part"
        fetched = part.stat().st_size if part.exists() else 0
        fetches = is_remote(file) and not is_from_user(folder, file)
        needed += sizes[file.name] * (fetches + (file.unpack is not None)) - fetched
    free = shutil.disk_usage(folder).free
    if files and needed + SPARE > free:
        raise DownloadError(
            f"{folder}: {needed / 1e9:.1f} GB are needed, and the disk has {free / 1e9:.1f} GB left "
            f"(of which {SPARE / 1e9:.1f} GB stay free); valid: another `folder`, or a larger disk"
        )


def receipt_path(folder: Path, file: SourceFile) -> Path:
    """Path of a file's receipt."""
    return folder / ".download" / f"{file.name}.json"


def read_receipt(folder: Path, file: SourceFile) -> dict[str, Any] | None:
    """Return the receipt of a file that is present and matches the configuration, else None."""
    path = receipt_path(folder, file)
    if not path.exists():
        return None
    receipt = json.loads(path.read_text())
    stated = {"size": file.size, "sha256": file.sha256 and file.sha256.lower()}
    fits = all(value in (None, receipt[key]) for key, value in stated.items())
    there = is_unpacked(folder, file) if file.unpack is not None else (folder / file.name).exists()
    return receipt if fits and there else None


def is_unpacked(folder: Path, file: SourceFile) -> bool:
    """True if all that an archive made lies where the configuration wants it."""
    record = members_path(folder, file)
    if not record.exists():
        return (folder / (file.unpack or ".")).is_dir()  # left by a version that kept no list
    made = json.loads(record.read_text(encoding="utf-8"))
    target = PurePosixPath(file.unpack or ".")
    return all(PurePosixPath(path).is_relative_to(target) and (folder / path).exists() for path in made)


def is_from_user(folder: Path, file: SourceFile) -> bool:
    """True if a file lies in its place and no download of ours put it there, or none that got to its end."""
    return (folder / file.name).exists() and not receipt_path(folder, file).exists()


def is_remote(file: SourceFile) -> bool:
    """True if a file is fetched over the network."""
    return urlsplit(file.address).scheme in ("http", "https")


def local_path(file: SourceFile) -> Path:
    """Path of a file on this machine; DownloadError if it doesn't exist."""
    path = Path(file.address.removeprefix("file://"))
    if not path.is_file():
        raise DownloadError(f"{file.url}: no such file; valid: http(s), or the path of a file on this machine")
    return path.absolute()


def link(path: Path, target: Path) -> None:
    """Replace `target` with a link to `path`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    target.symlink_to(path)


# Files of the Hub


def download_repository(name: str, source: Source, lock: DataLock, workers: int) -> dict[str, Any]:
    """Fill a source's folder with links into the Hub's cache; returns {revision, files}."""
    folder = Path(source.folder)
    snapshot = fetch_snapshot(name, source, lock, workers)
    with ThreadPoolExecutor(workers) as pool:
        progress = {"total": len(snapshot.paths), "desc": f"checking {name}", "unit": "file", "mininterval": 1}
        files = dict(zip(snapshot.paths, tqdm(pool.map(snapshot.check, snapshot.paths), **progress), strict=True))
    for path, found in files.items():
        snapshot.check_lock(path, found, lock)
    for path in snapshot.paths:
        targets = [file.unpack for file in source.files if file.unpack is not None and matches(path, file.name)]
        archive = SourceFile(path=path, unpack=targets[0] if targets else None)
        if not targets:
            link(snapshot.folder / path, folder / path)
        elif read_receipt(folder, archive) != files[path]:
            put_in_place(snapshot.folder / path, folder, archive, files[path], is_own=False)
    return {"revision": snapshot.commit, "files": files}
