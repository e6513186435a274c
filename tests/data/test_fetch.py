"""Download of one file over HTTP: after any fault of the server it is complete and fetched once, or one clear error."""

import resource

import pytest

from dualspeed.data.fetch import fetch, remote_size
from dualspeed.errors import DownloadError
from tests.support.http_server import HTTPServer

CONTENT = bytes(range(256)) * 400
QUICK = {"timeout": 0.5, "wait": 0.0, "attempts": 3}


@pytest.fixture
def server(tmp_path):
    (tmp_path / "served").mkdir()
    (tmp_path / "served/a.zip").write_bytes(CONTENT)
    with HTTPServer(tmp_path / "served") as server:
        yield server


def ranges(server):
    return [request.range for request in server.gets("/a.zip")]


def fetch_counted(server, path, **settings):
    """Fetch /a.zip to `path`; returns the sum of the counts that `on_bytes` got."""
    counts = []
    fetch(f"{server.url}/a.zip", path, on_bytes=counts.append, **QUICK | settings)
    return sum(counts)


@pytest.mark.parametrize("fault", ["break", "stall"])
def test_what_has_come_is_not_fetched_again(server, fault, tmp_path):
    server.fail("/a.zip", fault, 500, fault)
    assert fetch_counted(server, tmp_path / "out/a.zip") == len(CONTENT)
    assert (tmp_path / "out/a.zip").read_bytes() == CONTENT
    half = len(CONTENT) // 2
    assert ranges(server) == [None, f"bytes={half}-", f"bytes={half}-", f"bytes={half + half // 2}-"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.zip"]


def test_a_later_run_resumes_where_an_earlier_one_gave_up(server, tmp_path):
    server.fail("/a.zip", "break", 503, 503, 503)
    with pytest.raises(DownloadError, match=r"/a\.zip: given up after 3 attempts: the server answers 503"):
        fetch_counted(server, tmp_path / "a.zip")
    assert not (tmp_path / "a.zip").exists()
    assert fetch_counted(server, tmp_path / "a.zip") == len(CONTENT)
    assert ranges(server)[-1] == f"bytes={len(CONTENT) // 2}-"
    assert (tmp_path / "a.zip").read_bytes() == CONTENT


def test_a_file_that_changed_meanwhile_is_fetched_anew(server, tmp_path):
    server.fail("/a.zip", "break", 500, 500, 500)
    with pytest.raises(DownloadError):
        fetch_counted(server, tmp_path / "a.zip")
    changed = CONTENT[::-1] + b"more"
    (server.folder / "a.zip").write_bytes(changed)
    assert fetch_counted(server, tmp_path / "a.zip") == len(changed)
    assert (tmp_path / "a.zip").read_bytes() == changed


def test_a_file_that_became_shorter_than_what_is_here_is_fetched_anew(server, tmp_path):
    (tmp_path / "a.zip.part").write_bytes(CONTENT + b"more")
    (tmp_path / "a.zip.part.tag").write_text('"gone"')
    assert fetch_counted(server, tmp_path / "a.zip") == len(CONTENT)
    assert (tmp_path / "a.zip").read_bytes() == CONTENT


def test_a_part_that_is_whole_is_not_fetched_again(server, tmp_path):
    server.fail("/a.zip", "break")
    fetch_counted(server, tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "a.zip.part")
    (tmp_path / "a.zip.part.tag").write_text("x")
    server.requests.clear()
    assert remote_size(f"{server.url}/a.zip") == len(CONTENT)
    assert fetch_counted(server, tmp_path / "a.zip", size=len(CONTENT)) == len(CONTENT)
    assert (tmp_path / "a.zip").read_bytes() == CONTENT


def test_a_server_without_ranges_starts_over(server, tmp_path):
    server.has_ranges = False
    server.fail("/a.zip", "break")
    assert fetch_counted(server, tmp_path / "a.zip") == len(CONTENT)
    assert (tmp_path / "a.zip").read_bytes() == CONTENT


def test_a_truncated_answer_is_asked_for_again_where_the_size_is_known(server, tmp_path):
    server.fail("/a.zip", "truncate")
    fetch_counted(server, tmp_path / "a.zip", size=len(CONTENT))
    assert (tmp_path / "a.zip").read_bytes() == CONTENT
    server.fail("/a.zip", *["truncate"] * 3)
    with pytest.raises(DownloadError, match=rf"server offers {len(CONTENT) // 2} bytes, {len(CONTENT)} are expected"):
        fetch_counted(server, tmp_path / "b.zip", size=len(CONTENT))


@pytest.mark.parametrize("status", [403, 404])
def test_a_refusal_is_one_error_at_once(server, status, tmp_path):
    server.fail("/a.zip", status)
    with pytest.raises(DownloadError, match=rf"http.*/a\.zip: the server answers {status}"):
        fetch_counted(server, tmp_path / "a.zip")
    assert len(server.requests) == 1


def test_a_server_that_is_not_there_is_one_error(tmp_path):
    with HTTPServer(tmp_path) as server:
        url = f"{server.url}/a.zip"
    assert remote_size(url) is None
    with pytest.raises(DownloadError, match=r"/a\.zip: given up after 3 attempts"):
        fetch(url, tmp_path / "a.zip", **QUICK)


def test_a_full_disk_is_one_error(server, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # larger files fail to be written, as on a full disk
    try:
        with pytest.raises(DownloadError, match=r"a\.zip: cannot be written: .*File too large"):
            fetch_counted(server, tmp_path / "a.zip")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
