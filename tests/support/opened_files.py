"""Files that a process opens to read, by whatever library: Python's through an audit hook, all others by inotify."""

import ctypes
import os
import struct
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

HOOKED = """
import atexit, os, sys
opened = set()

def hook(event, arguments):
    if event == "open" and isinstance(arguments[0], str | bytes) and arguments[2] & os.O_ACCMODE == os.O_RDONLY:
        opened.add(os.path.abspath(os.fsdecode(arguments[0])))

def write():
    with open(sys.argv[1], "w") as file:
        file.write("\\n".join(opened))

sys.addaudithook(hook)
atexit.register(write)
from dualspeed.cli import main
sys.exit(main(sys.argv[2:]))
"""
IN_OPEN, IN_ISDIR, IN_NONBLOCK = 0x20, 0x40000000, 0o4000
EVENT = struct.Struct("iIII")
ENVIRONMENT = (*map(os.path.realpath, (sys.prefix, sys.base_prefix)), "/proc", "/sys", "/dev", "/etc", "/usr", "/lib")
"""Folders of Python, its packages and the system."""


class Watch:
    """Files that are opened in some folders while the block runs: `opened` behind it."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self.folders = [each for folder in folders for each in (folder, *folder.rglob("*")) if each.is_dir()]
        self.opened: set[Path] = set()

    def __enter__(self) -> "Watch":
        libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = libc.inotify_init1(IN_NONBLOCK)
        assert self._descriptor >= 0, os.strerror(ctypes.get_errno())
        self._names = {
            libc.inotify_add_watch(self._descriptor, os.fsencode(folder), IN_OPEN): folder for folder in self.folders
        }
        assert -1 not in self._names
        return self

    def __exit__(self, *_: object) -> None:
        while True:
            try:
                content = os.read(self._descriptor, 1 << 16)
            except BlockingIOError:
                break
            position = 0
            while position < len(content):
                watch, mask, _, length = EVENT.unpack_from(content, position)
                assert watch in self._names, "more events than the queue holds"
                name = content[position + EVENT.size : position + EVENT.size + length].rstrip(b"\0")
                if name and not mask & IN_ISDIR:
                    self.opened.add(self._names[watch] / os.fsdecode(name))
                position += EVENT.size + length
        os.close(self._descriptor)


def opened_files(arguments: Sequence[str], folders: Sequence[Path], log: Path) -> set[Path]:
    """Files outside the environment that `dualspeed` with these arguments reads; `folders` are those of its inputs."""
    with Watch(folders) as watch:
        command = [sys.executable, "-c", HOOKED, str(log), *arguments]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    by_python = {Path(line) for line in log.read_text().splitlines()}
    outside = {path for path in by_python if path.is_file() and not os.path.realpath(path).startswith(ENVIRONMENT)}
    return outside | watch.opened
