"""Sources to download, as a configuration lists them: read as they are meant, or refused with what would be valid."""

import pytest
import yaml

from dualspeed.errors import ConfigError
from dualspeed.settings.project import load_project
from dualspeed.settings.reading import read_dataclass
from dualspeed.settings.sources import Source, SourceFile, sources_of

DEMO = "config/demo/config.yaml"
COCO = {"kind": "url", "folder": "data/llava/coco", "files": [{"url": "http://a.org/zips/train2017.zip"}]}


def read(**changes):
    return read_dataclass(Source, COCO | changes, "config.yaml", "downloads.coco")


def load(downloads):
    with open(DEMO, encoding="utf-8") as file:
        return load_project(yaml.safe_load(file) | {"downloads": downloads})


def test_the_example_of_the_readme_is_valid():
    with open("config/README.md", encoding="utf-8") as file:
        example = next(block for block in file.read().split("```yaml\n")[1:] if block.startswith("downloads:"))
    sources = load(yaml.safe_load(example.split("```")[0])["downloads"]).downloads
    assert sources["llava-pretrain"].files[1] == SourceFile(path="images.zip", unpack="images")
    assert sources["coco"].files[0].name == "train2017.zip"
    assert sources["gqa"].existing == "/datasets/gqa"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "ftp"}, r"downloads\.coco\.kind: 'ftp' is unknown; valid: hub, url"),
        ({"kind": "hub"}, r"downloads\.coco\.repo: None; valid: a repository's name for kind hub"),
        ({"repo": "a/b"}, r"downloads\.coco\.repo: 'a/b'; valid: .*null for kind url"),
        ({"files": []}, r"downloads\.coco\.files: empty"),
        ({"files": [{"path": "x"}]}, r"files\[0\]\.url: None; valid: a URL"),
        ({"files": [{"url": "http://a.org/"}]}, r"files\[0\]\.url: 'http://a\.org/'; valid: a URL whose last part"),
        ({"kind": "hub", "repo": "a/b", "files": [{"url": "http://a.org/x"}]}, r"files\[0\]: valid for kind hub"),
        ({"files": [*COCO["files"], {"url": "http://b.org/train2017.zip"}]}, "a name comes twice"),
        ({"files": [{"url": "http://a.org/x", "unpack": "../up"}]}, r"files\[0\]\.unpack: '\.\./up' leads out"),
        ({"files": [{"url": "http://a.org/x", "path": "/etc/x"}]}, r"files\[0\]\.path: '/etc/x' leads out"),
        ({"files": [{"url": "http://a.org/x", "sha256": "abc"}]}, r"files\[0\]\.sha256: 'abc' is no checksum"),
        ({"files": [{"url": "http://a.org/x", "md5": "abc"}]}, r"files\[0\]\.md5: unknown key"),
    ],
)
def test_a_wrong_source_is_one_error(changes, message):
    with pytest.raises(ConfigError, match=message):
        read(**changes)


def test_two_sources_in_one_folder_are_an_error():
    with pytest.raises(ConfigError, match=r"downloads\.b\.folder: 'data/llava/coco/in' lies in that of downloads\.a"):
        load({"a": COCO, "b": COCO | {"folder": "data/llava/coco/in"}})


def test_what_lies_in_a_source_or_around_it_comes_from_it():
    sources = {"coco": read(), "gqa": read(folder="data/llava/gqa"), "json": read(folder="data/mix665k")}
    assert sources_of("data/llava", sources) == ["coco", "gqa"]
    assert sources_of("data/llava/coco", sources) == ["coco"]
    assert sources_of("data/mix665k/llava_v1_5_mix665k.json", sources) == ["json"]
    assert sources_of("data/llava/cocoa", sources) == []
