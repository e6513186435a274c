"""Atomic writes leave no partial file, whatever stops them: an error, a kill or a full disk."""

import os
import signal
import subprocess
import sys
import time

import pytest

from dualspeed.files import atomic_folder, sha256_of_json, write_atomic


def test_write_replaces_the_whole_file(tmp_path):
    path = tmp_path / "deep" / "file.json"
    write_atomic(path, "first")
    write_atomic(path, b"second")
    assert path.read_bytes() == b"second"
    assert list(path.parent.iterdir()) == [path]


def test_full_disk_leaves_the_old_file(tmp_path):
    """A limit on file size fails like a full disk: with an OSError in the middle of a write."""
    path = tmp_path / "file.bin"
    write_atomic(path, b"old")
    code = (
        "import resource, signal; from dualspeed.files import write_atomic;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
        f"write_atomic({str(path)!r}, b'new' * 1000)"
    )
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "OSError" in failed.stderr
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(RuntimeError), atomic_folder(out) as folder:
        (folder / "half").write_text("")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    for content in ("first", "second"):
        with atomic_folder(out) as folder:
            (folder / content).write_text("")
    assert [path.name for path in out.iterdir()] == ["second"]


def test_killed_writer_leaves_no_folder(tmp_path):
    code = (
        "import sys, time; from dualspeed.files import atomic_folder\n"
        "with atomic_folder(sys.argv[1]) as folder:\n"
        "    (folder / 'half').write_text('')\n"
        "    print('written', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"written\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.1)
    assert not (tmp_path / "out").exists()


def test_hash_does_not_depend_on_the_order_of_keys():
    assert sha256_of_json({"a": 1, "b": [2]}) == sha256_of_json({"b": [2], "a": 1})
    assert sha256_of_json({"a": 1}) != sha256_of_json({"a": 1.5})
