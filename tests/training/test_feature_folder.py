"""Files of kept features: whole or not there, whatever happens to their writers, and never another folder's."""

import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dualspeed.errors import FeatureCacheError, sentence_of
from dualspeed.training.feature_folder import MARK, file_of, open_folder, read_states, remove_leftovers, write_states

ADDRESS = {"tower": "of this test"}
DIGESTS = [f"{number:064x}" for number in range(1000)]


def states(number: int, size: int = 1000) -> dict[str, Tensor]:
    return {"layer_1": torch.full((1, size), number, dtype=torch.bfloat16), "cls_attention": torch.rand(1, 4)}


def leftovers(folder: Path) -> list[Path]:
    return list(folder.glob("*/.*"))


def test_what_was_written_is_read_bit_for_bit(tmp_path):
    folder, written = open_folder(tmp_path / "new" / "cache", ADDRESS), states(3)
    assert write_states(folder, DIGESTS[0], written) == file_of(folder, DIGESTS[0]).stat().st_size
    read = read_states(folder, DIGESTS[0])
    assert read.keys() == written.keys()
    assert all(read[name].dtype == written[name].dtype and torch.equal(read[name], written[name]) for name in read)
    assert open_folder(tmp_path / "new" / "cache", ADDRESS) == folder
    assert open_folder(tmp_path / "new" / "cache", {"tower": "another"}) != folder


def test_who_opens_a_folder_leaves_alone_what_another_training_writes(tmp_path):
    folder = open_folder(tmp_path, ADDRESS)
    begun = file_of(folder, DIGESTS[0]).with_name(f".{DIGESTS[0]}.begun")
    begun.parent.mkdir()
    begun.write_bytes(b"half")
    assert open_folder(tmp_path, ADDRESS) == folder
    assert leftovers(folder) == [begun]


def test_killed_writers_leave_nothing_half(tmp_path):
    """Twenty writers are killed while a file has been begun; what is there by its name is whole."""
    folder = open_folder(tmp_path, ADDRESS)
    num_begun = 0
    for kill in range(20):
        digests = DIGESTS[kill * 50 : (kill + 1) * 50]
        writer = os.fork()
        if writer == 0:
            for number, digest in enumerate(digests):
                write_states(folder, digest, states(number, 2_000_000))
            os._exit(0)
        while not (leftovers(folder) and (kill % 2 == 0 or file_of(folder, digests[kill // 4]).exists())):
            pass
        os.kill(writer, signal.SIGKILL)
        assert os.waitpid(writer, 0)[1] == signal.SIGKILL
        num_begun += len(leftovers(folder))
        for number, digest in enumerate(digests):
            if file_of(folder, digest).exists():
                read = read_states(folder, digest)
                assert torch.equal(read["layer_1"], states(number, 2_000_000)["layer_1"])
        remove_leftovers(folder)
        assert leftovers(folder) == []
        shutil.rmtree(folder / digests[0][:2], ignore_errors=True)
    assert num_begun >= 10  # some are finished between the look and the kill


@pytest.mark.parametrize("cut", [slice(0), slice(3), slice(4), slice(-1), slice(-8, None)])
def test_a_cut_file_is_removed_and_not_read(tmp_path, cut):
    folder = open_folder(tmp_path, ADDRESS)
    write_states(folder, DIGESTS[0], states(0))
    file = file_of(folder, DIGESTS[0])
    file.write_bytes(file.read_bytes()[cut])
    with pytest.raises(FeatureCacheError, match=f"{file} was damaged and is removed; start again, which encodes"):
        read_states(folder, DIGESTS[0])
    with pytest.raises(FeatureCacheError, match=f"{file} is missing; start again"):
        read_states(folder, DIGESTS[0])


def test_every_flipped_bit_is_found(tmp_path):
    folder = open_folder(tmp_path, ADDRESS)
    write_states(folder, DIGESTS[0], states(0, 8))
    file = file_of(folder, DIGESTS[0])
    whole = file.read_bytes()
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(FeatureCacheError, match="was damaged"):
            read_states(folder, DIGESTS[0])


def test_a_disk_that_is_full_in_the_middle_is_one_sentence(tmp_path):
    """The system's limit of a file's size stands for the disk's: the second image is larger."""
    folder, limits = open_folder(tmp_path, ADDRESS), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
        write_states(folder, DIGESTS[0], states(0))
        with pytest.raises(FeatureCacheError) as error:
            write_states(folder, DIGESTS[1], states(1, 20_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(error.value) == (
        f"cache_features: {tmp_path}: File too large; what was written whole stays usable; valid: a folder on a larger "
        "disk, or null"
    )
    assert leftovers(folder) == [] and not file_of(folder, DIGESTS[1]).exists()
    assert torch.equal(read_states(folder, DIGESTS[0])["layer_1"], states(0)["layer_1"])


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("notes.txt", "mine", "holds notes.txt, which is none of its files"),
        (MARK, '{"format": 2}', r"says \{'format': 2\}, not \{'format': 1\}"),
        (MARK, "{", r"says None, not \{'format': 1\}"),
    ],
)
def test_a_folder_of_something_else_is_refused_and_left_as_it_is(tmp_path, name, content, reason):
    (tmp_path / name).write_text(content)
    with pytest.raises(FeatureCacheError, match=f"cache_features: {tmp_path}.*{reason}; valid: a new or empty folder"):
        open_folder(tmp_path, ADDRESS)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == content


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FeatureCacheError, match="file is a file; valid: a new or empty folder"):
        open_folder(tmp_path / "file", ADDRESS)
    with pytest.raises(
        FeatureCacheError, match=r"cache_features: .*/file/inside: Not a directory; .*valid: a folder that"
    ):
        open_folder(tmp_path / "file" / "inside", ADDRESS)


def test_an_error_of_a_worker_is_a_sentence_too():
    def collate(rows):
        raise FeatureCacheError("cache_features: one sentence")

    with pytest.raises(FeatureCacheError, match="Original Traceback") as error:
        next(iter(torch.utils.data.DataLoader([1], collate_fn=collate, num_workers=1)))
    assert sentence_of(error.value) == "cache_features: one sentence"
    assert sentence_of(FeatureCacheError("of this process")) == "of this process"
