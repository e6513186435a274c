"""Download of whole sources: files are complete, checked, locked and fetched once, or one error says what is wrong."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from types import SimpleNamespace

import pytest
import yaml

from dualspeed.data.download import download
from dualspeed.data.lock import DataLock
from dualspeed.data.unpack import unpack
from dualspeed.errors import ArchiveError, DownloadError, LockError
from dualspeed.settings.jobs import write_settings
from dualspeed.settings.reading import read_dataclass
from dualspeed.settings.sources import Source
from tests.support.archives import zipped
from tests.support.http_server import HTTPServer, sha256
from tests.support.workflow import REPOSITORY, plan, snakemake

QUICK = {"timeout": 0.5, "wait": 0.0, "attempts": 3}
PICTURES = {"VG_100K/1.jpg": b"one" * 2000, "VG_100K/2.jpg": b"two" * 2000}


@pytest.fixture
def server(tmp_path):
    (tmp_path / "served").mkdir()
    (tmp_path / "served/images.zip").write_bytes(zipped(PICTURES))
    (tmp_path / "served/images2.zip").write_bytes(zipped({"VG_100K_2/3.jpg": b"three" * 2000}))
    (tmp_path / "served/vg.json").write_bytes(b'{"vg": 1}' * 5000)
    with HTTPServer(tmp_path / "served") as server:
        yield server


def genome(server, tmp_path, **changes):
    """Source in Visual Genome's layout: two archives and a plain file."""
    files = [
        {"url": f"{server.url}/images.zip", "unpack": "."},
        {"url": f"{server.url}/images2.zip", "unpack": "."},
        {"url": f"{server.url}/vg.json"},
    ]
    source = {"kind": "url", "folder": str(tmp_path / "data/vg"), "files": files}
    return read_dataclass(Source, source | changes, "config.yaml")


def lock_of(tmp_path):
    return DataLock(tmp_path / "config/data.lock")


def get(source, tmp_path):
    return download("vg", source, lock_of(tmp_path), workers=2, fetch_settings=QUICK)


def tree(folder):
    """Return {path: content} of a folder, without receipts."""
    files = [path for path in folder.rglob("*") if path.is_file() and ".download" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def expected_tree(server):
    vg = (server.folder / "vg.json").read_bytes()
    return PICTURES | {"VG_100K_2/3.jpg": b"three" * 2000, "vg.json": vg}


def num_gets(server):
    return sum(request.method == "GET" for request in server.requests)


def test_a_source_is_fetched_unpacked_and_locked_once(server, tmp_path):
    source = genome(server, tmp_path)
    entry = get(source, tmp_path)
    assert tree(tmp_path / "data/vg") == expected_tree(server)
    served = {path.name: path.read_bytes() for path in server.folder.iterdir()}
    assert entry["files"] == {name: {"size": len(it), "sha256": sha256(it)} for name, it in served.items()}
    assert json.loads((tmp_path / "config/data.lock").read_text()) == {"vg": entry}
    assert num_gets(server) == 3
    assert get(source, tmp_path) == entry
    assert num_gets(server) == 3


def test_an_archive_that_its_publisher_replaced_replaces_its_content(server, tmp_path):
    """Its members have the old names and sizes; one is new, and one is gone."""

    def only_images(content):
        (server.folder / "images.zip").write_bytes(zipped(content))
        url, digest = f"{server.url}/images.zip", sha256((server.folder / "images.zip").read_bytes())
        return genome(server, tmp_path, files=[{"url": url, "unpack": "in", "sha256": digest}])

    old = {"a.jpg": b"old" * 1000, "b.jpg": b"gone"}
    new = {"a.jpg": b"new" * 1000, "c.jpg": b"more"}
    get(only_images(old), tmp_path)
    (tmp_path / "data/vg/in/own.jpg").write_bytes(b"the user's")
    with pytest.raises(DownloadError, match=r"images\.zip: s.* in the configuration and .* in .*data\.lock"):
        get(only_images(new), tmp_path)
    (tmp_path / "config/data.lock").unlink()
    get(only_images(new), tmp_path)
    expected = {f"in/{name}": content for name, content in new.items()}
    assert tree(tmp_path / "data/vg") == expected | {"in/own.jpg": b"the user's"}


def test_a_file_that_its_publisher_replaced_is_fetched_again(server, tmp_path):
    for content in (b"old" * 100, b"new" * 100):
        (tmp_path / "config/data.lock").unlink(missing_ok=True)
        (server.folder / "vg.json").write_bytes(content)
        files = [{"url": f"{server.url}/vg.json", "sha256": sha256(content)}]
        get(genome(server, tmp_path, files=files), tmp_path)
        assert tree(tmp_path / "data/vg") == {"vg.json": content}


def test_content_of_another_place_or_that_was_deleted_is_unpacked_again(server, tmp_path):
    for target in ("in", ".", "."):
        files = [{"url": f"{server.url}/images.zip", "unpack": target}]
        get(genome(server, tmp_path, files=files), tmp_path)
        assert tree(tmp_path / "data/vg" / target) == PICTURES
        next((tmp_path / "data/vg" / target).rglob("1.jpg")).unlink()


@pytest.mark.parametrize("fault", ["break", "stall", "truncate", 500])
def test_a_fault_on_the_way_changes_nothing(server, fault, tmp_path):
    for name in ("images.zip", "vg.json"):
        server.fail(f"/{name}", fault)
    get(genome(server, tmp_path), tmp_path)
    assert tree(tmp_path / "data/vg") == expected_tree(server)


def test_a_file_that_fails_leaves_the_others_done(server, tmp_path):
    server.fail("/images2.zip", 404)
    with pytest.raises(DownloadError, match=r"/images2\.zip: the server answers 404"):
        get(genome(server, tmp_path), tmp_path)
    get(genome(server, tmp_path), tmp_path)
    assert tree(tmp_path / "data/vg") == expected_tree(server)
    assert [len(server.gets(f"/{name}")) for name in ("images.zip", "images2.zip", "vg.json")] == [1, 2, 1]


def test_a_wrong_checksum_is_one_error_and_is_fetched_anew_next_time(server, tmp_path):
    good = sha256((server.folder / "vg.json").read_bytes())
    files = [{"url": f"{server.url}/vg.json", "sha256": good.upper()}]
    server.fail("/vg.json", "corrupt")
    with pytest.raises(DownloadError, match=rf"/vg\.json: sha256 is .*, expected {good}: damaged"):
        get(genome(server, tmp_path, files=files), tmp_path)
    assert tree(tmp_path / "data/vg") == {}
    get(genome(server, tmp_path, files=files), tmp_path)
    assert tree(tmp_path / "data/vg") == {"vg.json": (server.folder / "vg.json").read_bytes()}


def test_a_later_download_has_to_get_what_the_first_one_got(server, tmp_path):
    get(genome(server, tmp_path), tmp_path)
    (server.folder / "vg.json").write_bytes(b'{"vg": 2}' * 5000)
    with pytest.raises(DownloadError, match=r"/vg\.json: sha256 is .*, expected"):
        get(genome(server, tmp_path, folder=str(tmp_path / "elsewhere")), tmp_path)
    (server.folder / "vg.json").write_bytes(b"shorter")
    with pytest.raises(DownloadError, match="the server offers 7 bytes, 45000 are expected"):
        get(genome(server, tmp_path, folder=str(tmp_path / "elsewhere")), tmp_path)


def test_a_configuration_that_contradicts_the_lock_is_an_error(server, tmp_path):
    get(genome(server, tmp_path), tmp_path)
    files = [{"url": f"{server.url}/vg.json", "size": 3}]
    with pytest.raises(DownloadError, match=r"vg\.json: size is 3 in the configuration and 45000 in .*data\.lock"):
        get(genome(server, tmp_path, files=files), tmp_path)


def test_a_torn_lock_is_one_error(server, tmp_path):
    (tmp_path / "config").mkdir()
    (tmp_path / "config/data.lock").write_text('{"vg": ')
    with pytest.raises(LockError, match=r"data\.lock: is not valid JSON"):
        get(genome(server, tmp_path), tmp_path)


def test_what_is_on_the_cluster_is_used_where_it_lies(server, tmp_path):
    there = tmp_path / "cluster/vg"
    there.mkdir(parents=True)
    (there / "vg.json").write_text("{}")
    get(genome(server, tmp_path, existing=str(there)), tmp_path)
    assert (tmp_path / "data/vg").resolve() == there
    files = [{"url": str(server.folder / "images.zip"), "unpack": "."}, {"url": str(there / "vg.json")}]
    get(genome(server, tmp_path, files=files), tmp_path)
    assert tree(tmp_path / "data/vg") == PICTURES | {"vg.json": b"{}"}
    assert tree(there) == {"vg.json": b"{}"}
    assert not server.requests
    with pytest.raises(DownloadError, match=r"downloads\.vg\.existing: .*gone is not a folder"):
        get(genome(server, tmp_path, existing=str(tmp_path / "gone")), tmp_path)


def test_a_file_that_someone_put_there_is_used_if_it_is_the_right_one(server, tmp_path):
    folder = tmp_path / "data/vg"
    folder.mkdir(parents=True)
    (folder / "images.zip").write_bytes((server.folder / "images.zip").read_bytes())
    (folder / "vg.json").write_bytes(b"torn")
    with pytest.raises(DownloadError, match=r"/vg\.json: size is 4, expected 45000"):
        get(genome(server, tmp_path), tmp_path)
    (folder / "vg.json").unlink()
    get(genome(server, tmp_path), tmp_path)
    assert tree(folder).keys() == expected_tree(server).keys() | {"images.zip"}
    assert not server.gets("/images.zip")


def test_a_disk_that_is_too_small_is_an_error_before_anything_is_fetched(server, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(DownloadError, match=r"data/vg: 0\.0 GB are needed, and the disk has 0\.0 GB left"):
        get(genome(server, tmp_path), tmp_path)
    assert num_gets(server) == 0


KILLED = """
import os, sys
from dualspeed.data import download, unpack

def die(path, folder, on_file):
    unpack.unpack(path, folder, lambda count: os._exit(9))

download.unpack = die
from dualspeed.cli import main
main(sys.argv[1:])
"""


def test_a_run_that_is_killed_while_it_unpacks_is_resumed(server, tmp_path):
    files = [{"url": f"{server.url}/images.zip", "unpack": "."}]
    source = genome(server, tmp_path, folder=str(tmp_path / "vg"), files=files)
    command = ["download", "vg", "--settings", str(write_settings(source, tmp_path / "settings"))]
    command += ["--lock", str(tmp_path / "data.lock"), "--out", str(tmp_path / "vg.json")]
    assert subprocess.run([sys.executable, "-c", KILLED, *command], capture_output=True).returncode == 9
    assert len(tree(tmp_path / "vg")) == 1
    subprocess.run([sys.executable, "-m", "dualspeed.cli", *command], check=True, capture_output=True)
    assert tree(tmp_path / "vg") == PICTURES
    assert json.loads((tmp_path / "vg.json").read_text()) == json.loads((tmp_path / "data.lock").read_text())["vg"]
    assert len(server.gets("/images.zip")) == 1


def test_the_workflow_downloads_once_and_prepares_what_it_downloaded(server, tmp_path):
    project = tmp_path / "project"
    for name in ("config", "workflow", "profiles"):
        shutil.copytree(REPOSITORY / name, project / name)
    shutil.copy(REPOSITORY / "Snakefile", project)
    config = yaml.safe_load((project / "config/demo/config.yaml").read_text())
    files = [{"url": f"{server.url}/vg.json"}, {"url": f"{server.url}/images.zip", "unpack": "."}]
    config["downloads"] = {"vg": {"kind": "url", "folder": "data/vg", "files": files}}
    config["models"]["tiny"]["stages"]["finetune"] |= {"annotations": "data/vg/vg.json", "images": "data"}
    (project / "config/demo/config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))

    prepared = "results/prepared/tiny/finetune"
    assert plan(project, prepared) >= {"Download vg", "Check and prepare the finetune data of tiny"}
    output = snakemake(project, "downloads")
    assert tree(project / "data/vg") == PICTURES | {"vg.json": b'{"vg": 1}' * 5000}, output[-3000:]
    assert (project / "config/demo/data.lock").exists()
    assert plan(project, "downloads") == set()
    assert "Download vg" not in plan(project, prepared)

    (project / "config/demo/config.yaml").write_text(
        yaml.safe_dump(config | {"downloads": {"vg": config["downloads"]["vg"] | {"files": files[::-1]}}})
    )
    assert plan(project, "downloads") == {
        "Download vg",
        "Everything is downloaded",
    }  # after an edit of a source only that source is downloaded,
    snakemake(project, "downloads")
    assert len(server.gets("/images.zip")) == len(server.gets("/vg.json")) == 1  # and its files are kept
    assert plan(project, "downloads") == set()


# Archives


def test_tar_archives_are_unpacked(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jpg").write_bytes(b"a" * 1000)
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "in", "images")
    assert unpack(tmp_path / "a.tar.gz", tmp_path / "out") == ["images/a.jpg"]
    assert tree(tmp_path / "out") == {"images/a.jpg": b"a" * 1000}


def link_member(kind):
    member = tarfile.TarInfo("images/link")
    member.type, member.linkname = kind, "/etc/passwd"
    return member


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (tarfile.TarInfo("../up.jpg"), r"'\.\./up\.jpg' leads out of the folder; refused"),
        (tarfile.TarInfo("/etc/up.jpg"), r"'/etc/up\.jpg' leads out"),
        (link_member(tarfile.SYMTYPE), "'images/link' is a link or a device; refused"),
        (link_member(tarfile.LNKTYPE), "'images/link' is a link or a device; refused"),
        (link_member(tarfile.CHRTYPE), "'images/link' is a link or a device; refused"),
    ],
)
def test_an_archive_that_leaves_its_folder_is_refused(member, message, tmp_path):
    with tarfile.open(tmp_path / "bad.tar", "w") as archive:
        archive.addfile(member)
    with pytest.raises(ArchiveError, match=message):
        unpack(tmp_path / "bad.tar", tmp_path / "out/in")
    assert tree(tmp_path / "out") == {}


def test_a_link_in_a_zip_is_refused(tmp_path):
    link = zipfile.ZipInfo("images/link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(ArchiveError, match="'images/link' is a link or a device; refused"):
        unpack(tmp_path / "bad.zip", tmp_path / "out")


def test_two_members_of_one_path_are_refused(tmp_path):
    (tmp_path / "bad.zip").write_bytes(zipped({"a/b.jpg": b"one", "a//b.jpg": b"two"}))
    with pytest.raises(ArchiveError, match=r"two members are written to 'a/b\.jpg'"):
        unpack(tmp_path / "bad.zip", tmp_path / "out")


def test_a_zip_that_leaves_its_folder_is_refused_whole(tmp_path):
    (tmp_path / "bad.zip").write_bytes(zipped({"good.jpg": b"x", "../up.jpg": b"x"}))
    with pytest.raises(ArchiveError, match=r"'\.\./up\.jpg' leads out"):
        unpack(tmp_path / "bad.zip", tmp_path / "out/in")
    assert tree(tmp_path / "out") == {}


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz"])
def test_a_damaged_archive_is_named(name, tmp_path):
    path = tmp_path / name
    if name == "a.zip":
        path.write_bytes(zipped({"a.jpg": os.urandom(5000)})[:-200])
    else:
        with tarfile.open(path, "w:gz") as archive:
            archive.addfile(member := tarfile.TarInfo("a.jpg"), io.BytesIO(os.urandom(member.size)))
            (tmp_path / "b").write_bytes(os.urandom(50_000))
            archive.add(tmp_path / "b")
        path.write_bytes(path.read_bytes()[:-20_000])
    with pytest.raises(ArchiveError, match=rf"{name}: damaged"):
        unpack(path, tmp_path / "out")


def test_a_page_in_an_archives_place_is_named(server, tmp_path):
    (server.folder / "images.zip").write_text("<html>Sorry, too many downloads</html>")
    with pytest.raises(ArchiveError, match=r"images\.zip: damaged, or no archive"):
        get(genome(server, tmp_path), tmp_path)
    assert "vg" not in lock_of(tmp_path)._read()


# The Hub: in processes of their own, since its client reads its environment when it is imported


@pytest.fixture
def hub(tmp_path):
    """Server with the Hub's interface and the layout of LLaVA's pretraining data; it asks for a token."""
    repo = tmp_path / "served/hub/datasets/liuhaotian/LLaVA-Pretrain"
    repo.mkdir(parents=True)
    (repo / "blip_laion_cc_sbu_558k.json").write_bytes(b'[{"id": "1"}]' * 2000)
    (repo / "images.zip").write_bytes(zipped({"00000/1.jpg": b"one" * 5000}))
    (repo / "README.md").write_text("# data")
    with HTTPServer(tmp_path / "served", token="secret") as server:
        server.repo = repo
        yield server


HUB_FILES = [{"path": "blip_*.json"}, {"path": "images.zip", "unpack": "images"}]
RESOLVE = "/datasets/liuhaotian/LLaVA-Pretrain/resolve"


def run_hub(hub, tmp_path, folder="data", files=HUB_FILES, revision=None, **environment):
    """Run `dualspeed download` on the hub's repository; returns (status, stderr, folder)."""
    source = {"kind": "hub", "repo": "liuhaotian/LLaVA-Pretrain", "folder": str(tmp_path / folder), "files": files}
    source = read_dataclass(Source, source | {"revision": revision}, "config.yaml")
    command = [sys.executable, "-m", "dualspeed.cli", "download", "pretrain"]
    command += ["--settings", str(write_settings(source, tmp_path / "settings"))]
    command += ["--lock", str(tmp_path / "data.lock"), "--out", str(tmp_path / f"{folder}.json")]
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "secret"}
    settings |= {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | environment
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr, tmp_path / folder


def content_paths(hub, name):
    return [request for request in hub.requests if request.method == "GET" and request.path.endswith(f"/{name}")]


def test_a_repository_comes_through_the_hubs_cache_and_is_locked(hub, tmp_path):
    hub.fail(f"{RESOLVE}/{hub.commit(hub.repo)}/images.zip", "break", "stall")
    status, errors, folder = run_hub(hub, tmp_path)
    assert status == 0, errors
    annotations = (hub.repo / "blip_laion_cc_sbu_558k.json").read_bytes()
    assert tree(folder) == {"blip_laion_cc_sbu_558k.json": annotations, "images/00000/1.jpg": b"one" * 5000}
    lock = json.loads((tmp_path / "data.lock").read_text())["pretrain"]
    assert lock["revision"] == hub.commit(hub.repo)
    assert lock["files"]["blip_laion_cc_sbu_558k.json"]["sha256"] == sha256(annotations)
    assert not content_paths(hub, "README.md")
    assert len(content_paths(hub, "images.zip")) == 3  # the Hub's client resumes from multiples of 10 MB

    hub.requests.clear()
    status, errors, other = run_hub(hub, tmp_path, folder="again", HF_HUB_OFFLINE="1")
    assert status == 0, errors
    assert tree(other) == tree(folder)
    assert not hub.requests

    (hub.repo / "README.md").write_text("# another commit")
    status, errors, _ = run_hub(hub, tmp_path, folder="third", HF_HOME=str(tmp_path / "fresh"))
    assert (status, errors.count("has no such revision")) == (1, 1), errors


@pytest.mark.parametrize(
    ("fault", "settings", "message"),
    [
        ("corrupt", {}, "images.zip: sha256 is .*damaged on the way; the next run fetches it again"),
        (404, {}, "LLaVA-Pretrain at main: the server answers 404"),
        (None, {"HF_TOKEN": ""}, "is gated: accept its terms on its page, and set HF_TOKEN"),
        (None, {"HF_HUB_OFFLINE": "1"}, "not in the cache .*home/hub, and HF_HUB_OFFLINE is set"),
        (None, {"revision": "v9"}, "LLaVA-Pretrain at v9: has no such revision"),
        (None, {"files": [{"path": "lost.json"}]}, "has no file 'lost.json'"),
    ],
)
def test_what_the_hub_refuses_is_one_line(hub, fault, settings, message, tmp_path):
    if fault:
        hub.fail(f"{RESOLVE}/{hub.commit(hub.repo)}/images.zip", fault)
    status, errors, _ = run_hub(hub, tmp_path, **settings)
    assert status == 1
    (line,) = [line for line in errors.splitlines() if line.startswith("dualspeed download: ")]
    assert re.search(message, line)
    assert "Traceback" not in errors
    if fault:
        status, errors, _ = run_hub(hub, tmp_path)
        assert status == 0, errors
