"""data.lock, beside the configuration: checksums of the first download, which every later one must match.

JSON: source -> {revision of a Hub repository, files: name -> {size, sha256}}. Keep it under version control; it is not
edited by hand.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from dualspeed.errors import LockError
from dualspeed.files import write_json


@dataclass(frozen=True)
class DataLock:
    """Lock file at `path`, which need not exist yet."""

    path: Path

    def entry(self, source: str) -> dict[str, Any]:
        """Return the entry of a source; {} before its first download."""
        return self._read().get(source, {})

    def file(self, source: str, name: str) -> dict[str, Any]:
        """Return {size, sha256} of a file of a source; {} if it isn't locked."""
        return self.entry(source).get("files", {}).get(name, {})

    def check(self, source: str, name: str, found: dict[str, Any]) -> None:
        """Raise LockError if the file is locked and `found` ({size, sha256}) differs."""
        locked = self.file(source, name)
        if locked and locked != found:
            raise LockError(
                f"{self.path}: {source}, {name}: locked are {locked['size']} bytes with sha256 {locked['sha256']}, "
                f"found are {found['size']} with {found['sha256']}: the file is damaged or was replaced. Download it "
                "again to see which; to accept a new version, remove the entry from the lock and state its sha256"
            )

    def record(self, source: str, entry: dict[str, Any]) -> None:
        """Add the new files of `entry` to the lock; safe while other jobs write to it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_name(f".{self.path.name}.guard")):
            locks = self._read()
            before = locks.get(source, {})
            merged = {**entry, **before, "files": {**entry["files"], **before.get("files", {})}}
            merged["files"] = dict(sorted(merged["files"].items()))
            if merged != before:
                write_json(self.path, dict(sorted({**locks, source: merged}.items())))

    def _read(self) -> dict[str, Any]:
        try:
            return json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise LockError(f"{self.path}: is not valid JSON: {error}; restore it from version control") from None
