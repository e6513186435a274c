"""One source of the configuration, from the network into its folder: fetched once, checked, unpacked.

Files come in parallel. Each has a receipt under `<folder>/.download/`, written when it is whole, checked and unpacked:
a run that was killed, or a later one, does only what has no receipt. What the Hub has comes through its own cache, and
the folder holds links into it.
"""

import json
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from dualspeed.data.fetch import fetch, remote_size
from dualspeed.data.hub import fetch_snapshot
from dualspeed.data.lock import DataLock
from dualspeed.data.unpack import unpack
from dualspeed.errors import DownloadError
from dualspeed.files import sha256_of_file, write_json
from dualspeed.settings.sources import Source, SourceFile

logger = logging.getLogger(__name__)

SPARE = 1 << 30
"""Bytes that a disk keeps free beyond what a download needs."""


def download(
    name: str, source: Source, lock: DataLock, workers: int = 4, fetch_settings: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Fill the folder of the source `name`; returns {revision, files: name -> {size, sha256}}, which `lock` then holds.

    `fetch_settings` are passed on to `fetch`: attempts, timeout, wait.

    Raises:
        DownloadError: a file cannot be had, is not what was published, or the disk is too small.
        LockError: it is not what an earlier download recorded.
        ArchiveError: an archive cannot be unpacked.
    """
    folder = Path(source.folder)
    if source.existing is not None:
        return link_existing(name, folder, Path(source.existing))
    if folder.is_symlink():
        folder.unlink()  # it led to an `existing` folder before
    folder.mkdir(parents=True, exist_ok=True)
    if source.kind == "hub":
        entry = download_repository(name, source, lock, workers)
    else:
        entry = {"files": download_files(name, source, lock, workers, fetch_settings or {})}
    lock.record(name, entry)
    logger.info("%s: %d files are in %s", name, len(entry["files"]), folder)
    return entry


def link_existing(name: str, folder: Path, existing: Path) -> dict[str, Any]:
    """Make a source's folder a link to where its files are already; they are nobody's to check or to lock."""
    if not existing.is_dir():
        raise DownloadError(
            f"downloads.{name}.existing: {existing} is not a folder; valid: one with the source's files"
        )
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        raise DownloadError(f"{folder}: is there already and no link, so it cannot lead to {existing}; move it away")
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.symlink_to(existing.absolute(), target_is_directory=True)
    return {"existing": str(existing), "files": {}}


# Files by URL


def download_files(
    name: str, source: Source, lock: DataLock, workers: int, fetch_settings: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """File name -> {size, sha256}, of each file of a source by URLs."""
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
        raise errors[0]  # the others are whole, and have their receipts
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
    elif there.exists():
        path = there  # by the user's hand, or by a run that was killed before its receipt
        expected = ({"size": size} if size else {}) | expected
    else:
        path = part
        if not part.exists():
            fetch(file.address, part, size, on_bytes, **fetch_settings)
    found = {"size": path.stat().st_size, "sha256": sha256_of_file(path)}
    for key, value in expected.items():
        if found[key] != value:
            if path == part:
                part.unlink()  # whole but wrong: to go on from it would be of no use
            raise DownloadError(f"{file.url}: {key} is {found[key]}, expected {value}: damaged, or another version")
    lock.check(name, file.name, found)
    put_in_place(path, folder, file, is_own=path == part)
    write_json(receipt_path(folder, file), found)
    return found


def put_in_place(path: Path, folder: Path, file: SourceFile, is_own: bool) -> None:
    """Unpack the archive at `path`, or move or link the file to where the source has it."""
    target = folder / file.name
    if file.unpack is not None:
        logger.info("unpacking %s", path)
        bar = tqdm(desc=f"unpacking {path.name}", unit="file", mininterval=1)
        with bar:
            unpack(path, folder / file.unpack, bar.update)
        if is_own:
            path.unlink()  # its content is there, and the receipt says so
    elif is_own:
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    elif path != target:
        link(path, target)


def expectation(name: str, file: SourceFile, lock: DataLock) -> dict[str, Any]:
    """{size, sha256} as far as the configuration or the lock states them; DownloadError if they disagree."""
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
    """Raise DownloadError if the disk cannot hold the files, and for archives their content as well.

    Photographs don't compress: the content of an archive takes about what the archive does.
    """
    needed = 0
    for file in files:
        part = folder / ".download" / f"{file.name}.part"
        fetched = part.stat().st_size if part.exists() else 0
        fetches = is_remote(file) and not (folder / file.name).exists()
        needed += sizes[file.name] * (fetches + (file.unpack is not None)) - fetched
    free = shutil.disk_usage(folder).free
    if files and needed + SPARE > free:
        raise DownloadError(
            f"{folder}: {needed / 1e9:.1f} GB are needed, and the disk has {free / 1e9:.1f} GB left "
            f"(of which {SPARE / 1e9:.1f} GB stay free); valid: another `folder`, or a larger disk"
        )


def receipt_path(folder: Path, file: SourceFile) -> Path:
    """Where the receipt of a file lies."""
    return folder / ".download" / f"{file.name}.json"


def read_receipt(folder: Path, file: SourceFile) -> dict[str, Any] | None:
    """The receipt of a file that is there as the configuration wants it, or None."""
    path = receipt_path(folder, file)
    if not path.exists():
        return None
    receipt = json.loads(path.read_text())
    stated = {"size": file.size, "sha256": file.sha256 and file.sha256.lower()}
    fits = all(value in (None, receipt[key]) for key, value in stated.items())
    there = (folder / file.unpack).is_dir() if file.unpack is not None else (folder / file.name).exists()
    return receipt if fits and there else None


def is_remote(file: SourceFile) -> bool:
    """Whether a file comes over the network."""
    return urlsplit(file.address).scheme in ("http", "https")


def local_path(file: SourceFile) -> Path:
    """A file of this machine, DownloadError if it is not there."""
    path = Path(file.address.removeprefix("file://"))
    if not path.is_file():
        raise DownloadError(f"{file.url}: no such file; valid: http(s), or the path of a file on this machine")
    return path.absolute()


def link(path: Path, target: Path) -> None:
    """Make `target` a link to `path`, whatever it was."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    target.symlink_to(path)


# Files of the Hub


def download_repository(name: str, source: Source, lock: DataLock, workers: int) -> dict[str, Any]:
    """{revision, files} of a source from the Hub, whose folder then holds links into the Hub's cache."""
    folder = Path(source.folder)
    snapshot = fetch_snapshot(name, source, lock, workers)
    with ThreadPoolExecutor(workers) as pool:
        progress = {"total": len(snapshot.paths), "desc": f"checking {name}", "unit": "file", "mininterval": 1}
        files = dict(zip(snapshot.paths, tqdm(pool.map(snapshot.check, snapshot.paths), **progress), strict=True))
    for path, found in files.items():
        snapshot.check_lock(path, found, lock)
    for path in snapshot.paths:
        goals = [file.unpack for file in source.files if file.unpack is not None and snapshot.matches(path, file.name)]
        receipt = receipt_path(folder, SourceFile(path=path))
        if not goals:
            link(snapshot.folder / path, folder / path)
        elif not receipt.exists() or json.loads(receipt.read_text()) != files[path]:
            put_in_place(snapshot.folder / path, folder, SourceFile(path=path, unpack=goals[0]), is_own=False)
            write_json(receipt, files[path])
    return {"revision": snapshot.commit, "files": files}
