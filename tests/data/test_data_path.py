"""Data path from a server to a prepared dataset, in LLaVA's published layouts: small files, real processes."""

import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import load_from_disk
from PIL import Image

from dualspeed.data.download import download
from dualspeed.data.lock import DataLock
from dualspeed.data.prepare import prepare_dataset
from dualspeed.settings.jobs import write_settings
from dualspeed.settings.reading import read_dataclass
from dualspeed.settings.recipe import DataRecipe
from dualspeed.settings.sources import Source
from tests.support import tiny
from tests.support.archives import tarred, zipped
from tests.support.http_server import HTTPServer
from tests.support.parquet import parquet_rows, write_parquet
from tests.support.samples import by_character, entry


def picture(kind="JPEG", mode="RGB", size=(40, 30)):
    """Content of an image file."""
    buffer = io.BytesIO()
    Image.effect_noise(size, 80).convert(mode).save(buffer, format=kind)
    return buffer.getvalue()


MIX = [
    entry("<image>\nq", "a", name="coco", image="coco/train2017/000000000009.jpg"),
    entry("q\n<image>", "a", "q", "a", name="gqa", image="gqa/images/2354786.jpg"),
    entry("<image>\nq", "a", name="ocr", image="ocr_vqa/images/0761183272.jpg"),
    entry("<image>\nq", "a", name="ocr gif", image="ocr_vqa/images/1878644036.jpg"),
    entry("<image>\nq", "a", name="ocr empty", image="ocr_vqa/images/0000000000.jpg"),
    entry("<image>\nq", "a", name="textvqa", image="textvqa/train_images/a23e20ef.jpg"),
    entry("<image>\nq", "a", name="vg", image="vg/VG_100K/2.jpg"),
    entry("<image>\nq", "a", name="vg 2", image="vg/VG_100K_2/1.jpg"),
    entry("q", "a", "q", name="text", model="chatgpt"),
]
IMAGE_FILES = {
    "zips/train2017.zip": zipped({"train2017/000000000009.jpg": picture()}),
    "gqa/images.zip": zipped({"images/2354786.jpg": picture(mode="L")}),
    "textvqa/train_val_images.zip": zipped({"train_images/a23e20ef.jpg": picture(mode="CMYK")}),
    "vg/images.zip": zipped({"VG_100K/2.jpg": picture()}),
    "vg/images2.zip": zipped({"VG_100K_2/1.jpg": picture()}),
    "ocr_vqa/images.tar.gz": tarred(
        {
            "images/0761183272.jpg": picture("GIF", "P"),  # a GIF that is named .jpg
            "images/1878644036.gif": picture("GIF", "P"),  # a GIF that the annotations name .jpg
            "images/0000000000.jpg": b"",
        }
    ),
}
HUB = "served/hub/datasets"


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {f"served/{name}": content for name, content in IMAGE_FILES.items()}
    pretrain = [entry("<image>\nDescribe.", "a", name="1", image="00453/004539375.jpg")]
    files[f"{HUB}/liuhaotian/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json"] = json.dumps(pretrain).encode()
    files[f"{HUB}/liuhaotian/LLaVA-Pretrain/images.zip"] = zipped({"00453/004539375.jpg": picture()})
    files[f"{HUB}/liuhaotian/LLaVA-Instruct-150K/llava_v1_5_mix665k.json"] = json.dumps(MIX).encode()
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    write_parquet(tmp_path / "parquet", parquet_rows())
    (tmp_path / f"{HUB}/lmms-lab/LLaVA-NeXT-Data").mkdir(parents=True)
    (tmp_path / "parquet").rename(tmp_path / f"{HUB}/lmms-lab/LLaVA-NeXT-Data/data")
    with HTTPServer(tmp_path / "served") as server:
        yield server


def sources(url):
    """Settings of the sources of all three datasets."""
    hub = {"kind": "hub", "repo_type": "dataset"}

    def by_url(folder, *names):
        files = [{"url": f"{url}/{name}", "unpack": "."} for name in names]
        return {"kind": "url", "folder": f"data/llava/{folder}", "files": files}

    return {
        "pretrain": hub
        | {
            "repo": "liuhaotian/LLaVA-Pretrain",
            "folder": "data/pretrain",
            "files": [{"path": "blip_laion_cc_sbu_558k.json"}, {"path": "images.zip", "unpack": "images"}],
        },
        "mix": hub
        | {
            "repo": "liuhaotian/LLaVA-Instruct-150K",
            "folder": "data/mix",
            "files": [{"path": "llava_v1_5_mix665k.json"}],
        },
        "next": hub
        | {"repo": "lmms-lab/LLaVA-NeXT-Data", "folder": "data/next", "files": [{"path": "data/*.parquet"}]},
        "coco": by_url("coco", "zips/train2017.zip"),
        "gqa": by_url("gqa", "gqa/images.zip"),
        "textvqa": by_url("textvqa", "textvqa/train_val_images.zip"),
        "vg": by_url("vg", "vg/images.zip", "vg/images2.zip"),
        "ocr_vqa": by_url("ocr_vqa", "ocr_vqa/images.tar.gz"),
    }


def download_all(server, *names):
    """Fill the folders of these sources below the working folder."""
    for name in names:
        source = read_dataclass(Source, sources(server.url)[name], "config.yaml")
        if source.kind == "url":
            download(name, source, DataLock(Path("data.lock")), fetch_settings={"wait": 0.0})
            continue
        # A process of its own, since the Hub's client reads its environment when it is imported.
        environment = {"HF_ENDPOINT": server.url, "HF_HOME": "home", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        settings = write_settings(source, "settings")
        line = [sys.executable, "-m", "dualspeed.cli", "download", name, "--settings", str(settings)]
        line += ["--lock", "data.lock", "--out", f"{name}.json"]
        done = subprocess.run(line, env=os.environ | environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]


def prepare(make_processor=tiny.llava_processor, **recipe):
    """Return the rows {id: images} and the manifest of a recipe."""
    by_character(make=make_processor).save_pretrained("model")
    manifest = prepare_dataset(DataRecipe(**recipe), "model", "out", workers=2)
    dataset = load_from_disk("out")
    return dict(zip(dataset["id"][:], dataset["images"][:], strict=True)), manifest


def test_pretraining_data_of_llava(server):
    download_all(server, "pretrain")
    rows, manifest = prepare(
        annotations="data/pretrain/blip_laion_cc_sbu_558k.json",
        images="data/pretrain/images",
        chat_template="plain",
    )
    assert rows == {"1": ["data/pretrain/images/00453/004539375.jpg"]}
    assert manifest["num_dropped"] == 0


def test_instruction_data_of_llava_with_its_five_image_roots(server):
    server.fail("/zips/train2017.zip", "break")
    server.fail("/vg/images2.zip", 500)
    download_all(server, "mix", "coco", "gqa", "textvqa", "vg", "ocr_vqa")
    rows, manifest = prepare(
        annotations="data/mix/llava_v1_5_mix665k.json",
        images="data/llava",
        max_dropped_share=0.2,
    )
    expected = {item["id"]: [f"data/llava/{item['image']}"] if "image" in item else [] for item in MIX}
    del expected["ocr empty"]
    expected["ocr gif"] = ["data/llava/ocr_vqa/images/1878644036.gif"]
    assert rows == expected
    assert [(item["id"], item["reason"]) for item in manifest["dropped"]] == [("ocr empty", "image: zero bytes")]
    assert [item["found"] for item in manifest["renamed"]] == expected["ocr gif"]
    assert manifest["converted_by_mode"] == {
        "converted from P": 2,
        "converted from L": 1,
        "converted from CMYK": 1,
    }


def test_parquet_data_of_llava_next(server):
    download_all(server, "next")
    rows, manifest = prepare(
        tiny.llava_next_processor, annotations="data/next/data", images="data/next-images", max_dropped_share=0.5
    )
    folder = "data/next-images/train-00000-of-00001"
    assert rows.keys() == {"jpeg", "text", "png"} and rows["text"] == []
    for name, start in {"jpeg": f"{folder}/0000000-", "png": f"{folder}/0000002-"}.items():
        (path,) = rows[name]
        assert path.startswith(start)
        assert hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16] == Path(path).stem.partition("-")[2]
    assert manifest["num_dropped"] == 2


@pytest.mark.slow
def test_memory_stays_flat_whatever_the_size(tmp_path):
    by_character().save_pretrained(tmp_path / "model")
    content = picture("PNG", size=(20, 20)) + bytes(200_000)  # bytes after an image's end are not decoded
    peaks = []
    for num_rows in (500, 2500):  # more than are checked in advance
        image = {"bytes": content, "path": None}
        rows = [entry("<image>\nq", "a", name=str(row), image=image) for row in range(100)]
        for part in range(num_rows // 100):
            write_parquet(tmp_path / f"data{num_rows}", rows, f"train-{part:05d}.parquet")
        recipe = DataRecipe(annotations=str(tmp_path / f"data{num_rows}"), images=str(tmp_path / f"images{num_rows}"))
        settings = write_settings(recipe, tmp_path / "settings")
        line = [sys.executable, "-m", "dualspeed.cli", "prepare", "--settings", str(settings)]
        line += ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--workers", "2"]
        process = subprocess.Popen(line, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0
        peaks.append(usage.ru_maxrss * 1024)
    assert peaks[1] - peaks[0] < 2000 * len(content) / 4
