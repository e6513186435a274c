"""Damaged archives: refused, or unpacked to as many files as the call says, and never outside the folder."""

import io
import shutil
import tarfile
import zipfile

from hypothesis import strategies as st

from dualspeed.data.unpack import unpack
from tests.support.archives import tarred, zipped
from tests.support.mutations import mutated_bytes

MEMBERS = {"a/1.jpg": b"\xff\xd8" + bytes(300), "a/2.jpg": b"two" * 50, "b.txt": "é".encode(), "c/d/e.png": b""}


def compressed(kind):
    """Content of an archive of MEMBERS, as tar with this compression, or as a deflated zip."""
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in MEMBERS.items():
                archive.writestr(name, content)
        return buffer.getvalue()
    with tarfile.open(fileobj=buffer, mode=f"w:{kind}") as archive:
        for name, content in MEMBERS.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def test_archives(fuzz, tmp_path):
    around = tmp_path / "around"
    samples = [zipped(MEMBERS), tarred(MEMBERS), *(compressed(kind) for kind in ("", "bz2", "xz", "zip"))]
    odd_names = st.dictionaries(
        st.sampled_from(["../x", "/x", "a", "a/b", "a/", ".", "a//b", "C:\\x", "a\\b", "é" * 130, "a\0b", "A"]),
        st.binary(max_size=20),
        max_size=4,
    )

    def check(content):
        shutil.rmtree(around, ignore_errors=True)
        (around / "in").mkdir(parents=True)
        (around / "archive").write_bytes(content)
        try:
            written = unpack(around / "archive", around / "in" / "folder")
        finally:
            assert {path.name for path in around.iterdir()} == {"archive", "in"}
            assert {path.name for path in (around / "in").iterdir()} <= {"folder"}
        files = [path for path in (around / "in" / "folder").rglob("*") if not path.is_dir()]
        assert sorted(str(path.relative_to(around / "in" / "folder")) for path in files) == written
        return "unpacked" if written else "empty"

    counts = fuzz("archives", mutated_bytes(samples) | odd_names.map(zipped) | odd_names.map(tarred), check, share=0.1)
    assert counts["refused (ArchiveError)"]
