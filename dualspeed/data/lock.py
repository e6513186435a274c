"""data.lock, beside the configuration: what the first download got, so that every later one gets the same or fails.

JSON: source -> {revision of a Hub repository, files: name -> {size, sha256}}. It belongs under version control; nobody
writes it by hand.
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
    """The lock file at `path`, which need not exist yet."""

    path: Path

    def entry(self, source: str) -> dict[str, Any]:
        """What the lock holds of a source: {} before its first download."""
        return self._read().get(source, {})

    def file(self, source: str, name: str) -> dict[str, Any]:
        """{size, sha256} of one of its files, or {}."""
        return self.entry(source).get("files", {}).get(name, {})

    def check(self, source: str, name: str, found: dict[str, Any]) -> None:
        """Raise LockError unless `found` ({size, sha256}) is what the lock holds of this file, if it holds anything."""
        locked = self.file(source, name)
        if locked and locked != found:
            raise LockError(
                f"{self.path}: {source}, {name}: locked are {locked['size']} bytes with sha256 {locked['sha256']}, "
                f"found are {found['size']} with {found['sha256']}: the file was damaged or replaced. Another download "
                "shows which; to accept a new version, remove the entry from the lock"
            )

    def record(self, source: str, entry: dict[str, Any]) -> None:
        """Add what is new in `entry` to what is locked; other jobs may be writing at the same time."""
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
            raise LockError(f"{self.path}: is not valid JSON: {error}; take it from version control again") from None
