"""Download of Hugging Face Hub repositories by the Hub's client, with HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE.

The client itself resumes incomplete files. This module adds a fixed revision, retries of temporary errors, checks of
disk space and checksums, and errors that say what to do.
"""

import fnmatch
import logging
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    DryRunError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dualspeed.data.fetch import ATTEMPTS, TEMPORARY_STATUS, WAIT
from dualspeed.data.lock import DataLock
from dualspeed.errors import DownloadError, LockError
from dualspeed.files import sha256_of_file
from dualspeed.settings.sources import Source

logger = logging.getLogger(__name__)

COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Snapshot:
    """Files of one commit of a repository, in the Hub's cache."""

    name: str
    """Name of the source."""
    folder: Path
    """Folder of the commit in the cache."""
    paths: tuple[str, ...]
    """Paths in the repository of the files that the source asks for."""

    @property
    def commit(self) -> str:
        """Hash of the commit, by which the cache names its folder."""
        return self.folder.name

    def check(self, path: str) -> dict[str, Any]:
        """Return {size, sha256} of a file.

        Raises:
            DownloadError: the Hub states another checksum; the file is then deleted from the cache.
        """
        blob = (self.folder / path).resolve()
        found = {"size": blob.stat().st_size, "sha256": sha256_of_file(blob)}
        # The cache names a large file's blob by the checksum that the Hub states.
        if SHA256.fullmatch(blob.name) and blob.name != found["sha256"]:
            blob.unlink()
            raise DownloadError(
                f"{self.name}: {path}: sha256 is {found['sha256']}, the Hub states {blob.name}: damaged on the way; "
                "the next run fetches it again"
            )
        return found

    def check_lock(self, path: str, found: dict[str, Any], lock: DataLock) -> None:
        """Raise LockError if a file differs from the lock, and delete it from the cache."""
        try:
            lock.check(self.name, path, found)
        except LockError:
            (self.folder / path).resolve().unlink()
            raise


def fetch_snapshot(
    name: str, source: Source, lock: DataLock, workers: int, attempts: int = ATTEMPTS, wait: float = WAIT
) -> Snapshot:
    """Fetch the source's files into the Hub's cache, at the locked revision or else the configured one.

    Raises:
        DownloadError: the Hub refuses, the files don't exist, or the disk is too small.
        LockError: the configuration asks for another commit than the lock holds.
    """
    revision = choose_revision(name, source, lock)
    request: dict[str, Any] = {
        "repo_id": source.repo,
        "repo_type": source.repo_type,
        "revision": revision,
        "allow_patterns": [file.name for file in source.files] or None,
        "max_workers": workers,
    }
    for attempt in range(1, attempts + 1):
        try:
            check_space(name, request)
            folder = Path(snapshot_download(**request))
            break
        except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
            message, is_temporary = explain(error, source)
            if attempt == attempts or not is_temporary:
                raise DownloadError(f"{name}: {source.repo} at {revision}: {message}") from None
            logger.warning("%s: %s; another attempt", name, message)
            time.sleep(wait * 2 ** (attempt - 1))
    paths = tuple(sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()))
    if source.files:
        for file in source.files:
            if not any(matches(path, file.name) for path in paths):
                raise DownloadError(f"{name}: {source.repo} at {folder.name} has no file {file.name!r}")
        paths = tuple(path for path in paths if any(matches(path, file.name) for file in source.files))
    return Snapshot(name, folder, paths)


def matches(path: str, pattern: str) -> bool:
    """True if a file of the repository matches a pattern of the configuration."""
    return fnmatch.fnmatch(path, pattern)


def choose_revision(name: str, source: Source, lock: DataLock) -> str:
    """Return the locked commit, or the configured revision before the first download."""
    locked = lock.entry(name).get("revision")
    if locked is None:
        return source.revision or constants.DEFAULT_REVISION
    if source.revision and COMMIT.fullmatch(source.revision) and source.revision != locked:
        raise LockError(
            f"{lock.path}: {name}: locked is {locked}, the configuration asks for {source.revision}; "
            "to accept it, remove the entry from the lock"
        )
    return locked


def check_space(name: str, request: dict[str, Any]) -> None:
    """Raise DownloadError if the disk of the Hub's cache can't hold the missing files."""
    try:
        files = snapshot_download(**request, dry_run=True)
    except DryRunError:
        return  # offline: snapshot_download uses the cache, or reports what is missing
    needed = sum(file.file_size or 0 for file in files if file.will_download)
    cache = Path(constants.HF_HUB_CACHE)
    existing = next(parent for parent in (cache, *cache.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    logger.info("%s: %.1f GB to download to %s", name, needed / 1e9, cache)
    if needed > free:
        raise DownloadError(
            f"{name}: {needed / 1e9:.1f} GB are needed in {cache} and the disk has {free / 1e9:.1f} GB left; "
            "HF_HOME moves the cache"
        )


def explain(error: Exception, source: Source) -> tuple[str, bool]:
    """Return the message for an error of the Hub's client, and True if another attempt may help."""
    if isinstance(error, GatedRepoError):
        return "is gated: accept its terms on its page, and set HF_TOKEN to a token of that account", False
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"no such {source.repo_type}, or a private one: valid is a name on {constants.ENDPOINT}, or HF_TOKEN",
            False,
        )
    if isinstance(error, RevisionNotFoundError):
        return "has no such revision", False
    if isinstance(error, HfHubHTTPError) and not isinstance(error, LocalEntryNotFoundError):
        status = error.response.status_code
        return f"the server answers {status}", status in TEMPORARY_STATUS
    if constants.HF_HUB_OFFLINE:
        return f"not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set", False
    is_local = isinstance(error, OSError) and error.errno is not None  # such as a full disk: no retry
    return " ".join(str(error).split()), not is_local
