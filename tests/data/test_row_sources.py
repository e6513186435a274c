"""Sources of rows, from files and from the Hub, and the preparation of several into one dataset."""

import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, load_from_disk
from PIL import Image
from transformers import AutoProcessor

from dualspeed.chat_templates import use_template
from dualspeed.data import row_sources
from dualspeed.data.collator import ConversationCollator
from dualspeed.data.images import open_image
from dualspeed.data.prepare import prepare_dataset
from dualspeed.data.row_sources import iter_rows, open_source
from dualspeed.data.rows import read_row
from dualspeed.errors import AnnotationsError, PreparationError
from dualspeed.settings.data_source import DataSource
from dualspeed.settings.recipe import DataRecipe
from tests.support.http_server import HTTPServer
from tests.support.rows import NO_IMAGE, ONE_IMAGE, PAIRS, picture, said, write_sources
from tests.support.samples import by_character, user


def source(**fields):
    return DataSource(**{name: str(value) if isinstance(value, Path) else value for name, value in fields.items()})


def numbers(found):
    """Number of each row."""
    return [int(row.name.rpartition(":")[2]) for row in found]


def test_shares_are_spread_over_the_rows_and_add_up():
    for share in (0.1, 0.25, 0.34, 0.5, 0.7, 0.999, 1.0):
        one = source(path="x", share=share)
        for num_rows in (1, 2, 10, 97, 1000):
            taken = [number for number in range(num_rows) if one.takes(number)]
            assert len(taken) == one.num_taken(num_rows)
            assert abs(len(taken) - share * num_rows) < 1
            assert all(
                abs(len([number for number in taken if number < end]) - share * end) < 1 for end in range(num_rows)
            )
    limited = source(path="x", limit=3)
    assert [limited.takes(number) for number in range(5)] == [True] * 3 + [False] * 2
    assert (limited.num_taken(2), limited.num_taken(9)) == (2, 3)


@pytest.mark.parametrize("path", ["rows.json", "rows.jsonl", "rows.parquet", "folder", "saved", "splits"])
def test_the_same_rows_come_from_every_kind_of_file(path, tmp_path):
    rows = [
        {"messages": [said("user", f"q{n}"), said("assistant", "a")], "images": [], "id": str(n)} for n in range(70)
    ]
    if path == "rows.json":
        (tmp_path / path).write_text(json.dumps(rows))
    elif path == "rows.jsonl":
        (tmp_path / path).write_text("\n".join(json.dumps(row) for row in rows))
    elif path == "rows.parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / path)
    elif path == "folder":
        (tmp_path / path / "deep").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows[:33]), tmp_path / path / "a.parquet")
        pq.write_table(pa.Table.from_pylist(rows[33:]), tmp_path / path / "deep/b.parquet")
    elif path == "saved":
        Dataset.from_list(rows).save_to_disk(tmp_path / path)
    else:
        other = Dataset.from_list(rows[:1])
        DatasetDict({"train": Dataset.from_list(rows), "test": other}).save_to_disk(tmp_path / path)
    opened = open_source(source(path=tmp_path / path))
    assert opened.num_rows == 70
    found = list(opened.rows)
    assert [row.value for row in found] == rows
    in_folder = [*range(1, 34), *range(1, 38)]  # each file has its own numbers
    assert numbers(found) == (in_folder if path == "folder" else list(range(1, 71)))
    assert found[1].name.endswith(":2") and str(tmp_path) in found[1].place
    tenth = [row.value["id"] for row in iter_rows(source(path=tmp_path / path, share=0.1))]
    assert tenth == ["9", "19", "29", "39", "49", "59", "69"]
    assert numbers(iter_rows(source(path=tmp_path / path, limit=2))) == [1, 2]
    if path == "splits":
        assert numbers(iter_rows(source(path=tmp_path / path, split="test"))) == [1]


@pytest.mark.parametrize("path", ["saved", "mixed.parquet"])
def test_messages_of_mixed_content_and_images_are_read_as_they_were_stored(path, tmp_path):
    """`datasets` stores such content as JSON text, and decodes images when a row is asked for."""
    write_sources(tmp_path)
    if path == "mixed.parquet":
        load_from_disk(tmp_path / "saved")["train"].to_parquet(tmp_path / path)
    found = [read_row(row.value, row.name) for row in iter_rows(source(path=tmp_path / path))]
    assert [record["messages"] for record in found] == [NO_IMAGE, [ONE_IMAGE[0], NO_IMAGE[1]]] * 2
    assert [len(record["images"]) for record in found] == [0, 1, 0, 1]
    assert open_image(found[3]["images"][0]).getpixel((0, 0)) == (0x30, 0, 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": "gone.json"}, "gone.json: does not exist"),
        ({"path": "text.parquet"}, "text.parquet: has columns text; valid: messages; prompt and completion"),
        ({"path": "text"}, "text: has columns text; valid: messages"),
        ({"path": "broken"}, "broken: cannot be read as a saved dataset"),
        ({"path": "broken.parquet"}, "broken.parquet: cannot be read as parquet"),
        ({"path": "empty"}, "empty: no parquet file in this folder"),
        ({"path": "saved", "split": "dev"}, "saved: has no split 'dev'; valid: train, test"),
        ({"path": "text", "split": "dev"}, "text: has no split 'dev'; valid: null: it has one"),
        ({"path": "chat.json", "split": "train"}, "chat.json: split 'train' of what has none"),
        ({"path": "saved", "format": "texts"}, "saved: has columns messages, images; valid: texts"),
    ],
)
def test_a_source_that_cannot_be_read_is_one_clear_error(fields, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_sources(tmp_path)
    pq.write_table(pa.table({"text": ["q"]}), "text.parquet")
    Dataset.from_list([{"text": "q"}]).save_to_disk("text")
    Path("broken.parquet").write_text("<html>")
    for folder in ("broken", "empty"):
        Path(folder).mkdir()
    Path("broken/dataset_info.json").write_text("{")
    with pytest.raises(AnnotationsError, match=message):
        list(iter_rows(source(**fields)))


def test_a_saved_dataset_that_is_torn_says_where(tmp_path):
    rows = [{"messages": [said("user", "q" * 1000), said("assistant", "a")]} for _ in range(200)]
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(AnnotationsError, match=r"saved: (cannot be read as a saved dataset|is damaged after row)"):
        list(iter_rows(source(path=tmp_path / "saved")))


HUB = """
import json, sys
from dualspeed.data.row_sources import open_source
from dualspeed.data.rows import read_row
from dualspeed.errors import DualSpeedError
from dualspeed.settings.data_source import DataSource

for fields in json.loads(sys.argv[1]):
    try:
        opened = open_source(DataSource(**fields))
        records = [read_row(row.value, row.name) for row in opened.rows]
        for record in records:
            record["images"] = [len(image["bytes"]) for image in record["images"]]
        print(json.dumps([opened.revision, opened.num_rows, records]))
    except DualSpeedError as error:
        print(json.dumps(f"{type(error).__name__}: {error}"))
"""
README = """---
configs:
- config_name: chat
  data_files:
  - {split: train, path: chat/train-*.parquet}
  - {split: test, path: chat/test.parquet}
- config_name: cauldron
  data_files: cauldron/*.parquet
---
"""


def test_datasets_of_the_hub_are_streamed(tmp_path):
    repo = tmp_path / "served/hub/datasets/acme/mix"
    write_sources(repo)
    (repo / "chat").mkdir()
    for split, first in {"train-0": 0, "train-1": 2, "test": 9}.items():
        rows = [{"id": str(n), "messages": [said("user", f"q{n}"), said("assistant", "a")]} for n in (first, first + 1)]
        pq.write_table(pa.Table.from_pylist(rows), repo / f"chat/{split}.parquet")
    (repo / "README.md").write_text(README)
    asked = [
        {"hub": "acme/mix", "config": "chat"},
        {"hub": "acme/mix", "config": "chat", "split": "test", "limit": 1},
        {"hub": "acme/mix", "config": "cauldron", "share": 0.5},
        {"hub": "acme/mix", "config": "chat", "split": "dev"},
        {"hub": "acme/mix", "config": "lost"},
        {"hub": "acme/lost"},
        {"hub": "acme/mix", "config": "cauldron", "format": "messages"},
    ]
    with HTTPServer(tmp_path / "served") as server:
        # A process of its own, since the Hub's clients read their environment when they are imported.
        environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        line = [sys.executable, "-c", HUB, json.dumps(asked)]
        done = subprocess.run(line, env=os.environ | environment, capture_output=True, text=True, timeout=300)
        commit = server.commit(repo)
        fetched = server.gets(f"/datasets/acme/mix/resolve/{commit}/cauldron/train-00000.parquet")
    assert done.returncode == 0, done.stderr[-3000:]
    chat, limited, cauldron, *errors = [json.loads(line) for line in done.stdout.splitlines()]
    assert chat[:2] == [commit, None] and [record["id"] for record in chat[2]] == ["0", "1", "2", "3"]
    assert chat[2][0]["messages"][0] == user("q0")
    assert limited[1] == 1 and [record["id"] for record in limited[2]] == ["9"]
    sizes = [len(picture(f"#{16 * number:02x}0000")) for number in (1, 3)]
    assert [record["images"] for record in cauldron[2]] == [[size] * 2 for size in sizes]
    assert [record["id"] for record in cauldron[2]] == ["cauldron:2", "cauldron:4"]
    assert fetched and all(request.range for request in fetched)
    no_split, no_config, no_dataset, no_format = errors
    assert no_split.startswith("DownloadError: acme/mix/chat/dev: cannot be loaded: ") and "dev" in no_split
    assert no_config.startswith("DownloadError: acme/mix/lost: cannot be loaded: ") and "cauldron" in no_config
    assert no_dataset.startswith("DownloadError: acme/lost: cannot be loaded: ") and server.url in no_dataset
    assert no_format == (
        "AnnotationsError: acme/mix/cauldron: has columns images, texts; valid: messages (docs/data.md)"
    )


@pytest.fixture
def mix(tmp_path, monkeypatch):
    """Three sources and a model with a character as token, in the working folder."""
    monkeypatch.chdir(tmp_path)
    write_sources(tmp_path / "data")
    by_character().save_pretrained("model")
    return [
        source(path="data/chat.json", images="data/images"),
        source(path="data/cauldron", share=0.5),
        source(path="data/saved", limit=3),
    ]


def prepare(sources, out="out", **settings):
    """Return the dataset and the manifest of a recipe."""
    settings = {"chat_template": "turns", "max_length": 400} | settings
    manifest = prepare_dataset(DataRecipe(data=tuple(sources), **settings), "model", out, workers=2)
    return load_from_disk(out), manifest


def test_several_sources_become_one_dataset(mix):
    dataset, manifest = prepare(mix)
    chats = [f"chat {number}" for number in range(4)]
    assert dataset["id"][:] == [
        *chats,
        "train-00000.parquet:2",
        "train-00001.parquet:2",
        "saved:1",
        "saved:2",
        "saved:3",
    ]
    assert manifest["num_samples"] == 9 and manifest["num_dropped"] == 0
    assert [(item["source"], item["num_samples"], item["commit"]) for item in manifest["sources"]] == [
        ("data[0] data/chat.json", 4, None),
        ("data[1] data/cauldron", 2, None),
        ("data[2] data/saved", 3, None),
    ]
    assert json.loads(Path("out/manifest.json").read_text()) == manifest
    # Images of rows are files named by their content, in the prepared folder; each is there once.
    (first, again), (path,) = dataset[4]["images"], dataset[7]["images"]
    digest = hashlib.sha256(picture("#100000")).hexdigest()
    assert first == again == f"out/images/{digest[:2]}/{digest}.png"
    assert Image.open(path).getpixel((0, 0)) == (0x10, 0, 0)
    assert len([file for file in Path("out/images").rglob("*") if file.is_file()]) == manifest["num_images"] - 1 == 3
    assert list(Path().glob(".out*")) == []
    processor = AutoProcessor.from_pretrained("model")
    use_template(processor, "turns")
    batch = ConversationCollator(processor)(list(dataset))
    assert dataset["num_tokens"][:] == batch["attention_mask"].sum(dim=1).tolist()


def test_another_share_finds_the_images_of_the_first(mix):
    one, before = prepare([source(path="data/cauldron", share=0.5, images="shown")])
    kept = {path: path.stat().st_mtime_ns for path in Path("shown").rglob("*.png")}
    both, after = prepare([source(path="data/cauldron", images="shown")])
    assert one["images"][:] == [both["images"][1], both["images"][3]]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept and len(list(Path("shown").rglob("*.png"))) == 4
    assert before["images_sha256"] != after["images_sha256"]
    again, repeated = prepare([source(path="data/cauldron", images="shown")])
    assert repeated == after and again[:] == both[:]


def test_a_prepared_dataset_does_not_tell_where_it_was_made(mix):
    first, one = prepare(mix)
    second, other = prepare(mix)
    assert first[:] == second[:] and one == other


def test_rows_that_cannot_be_used_are_counted_by_source_and_reason(mix):
    bad = [
        {"id": "video", "messages": [said("user", "q"), said("assistant", "a")], "video": "a.mp4"},
        {"id": "url", "messages": [said("user", "q"), said("assistant", "a")], "images": ["http://example.org/a.png"]},
        {"id": "lost", "messages": [said("user", "q"), said("assistant", "a")], "images": ["lost.png"]},
        {"id": "system", "messages": [said("system", "s"), said("user", "q"), said("assistant", "a")]},
        {"id": "long", "messages": [said("user", "q" * 500), said("assistant", "a")]},
    ]
    Path("bad.jsonl").write_text("\n".join([*map(json.dumps, bad), '{"id": "torn']))
    torn = [{"images": [{"bytes": picture()[:-30], "path": None}], "texts": PAIRS}]
    pq.write_table(pa.Table.from_pylist(torn), "torn.parquet")
    sources = [*mix, source(path="bad.jsonl", images="data/images"), source(path="torn.parquet")]
    dataset, manifest = prepare(sources, max_dropped_share=0.5)
    assert len(dataset) == 9
    reasons = [item["dropped_by_reason"] for item in manifest["sources"]]
    expected = {
        "video or audio": 1,
        "image is an address": 1,
        "malformed JSON line": 1,
        "image: missing": 1,
        "not for this chat template": 1,
        "nothing supervised within max_length": 1,
    }
    assert reasons == [{}, {}, {}, expected, {"image: truncated or damaged": 1}]
    assert manifest["num_dropped"] == 7 == sum(item["num_dropped"] for item in manifest["sources"])
    places = {item["id"]: item["file"] for item in manifest["dropped"]}
    assert places["video"] == "bad.jsonl:1" and places["lost"] == "data/images/lost.png"
    assert places["torn.parquet:1"].startswith("out/images/")
    with pytest.raises(PreparationError, match=r"data/chat\.json \+ data/cauldron .*7 of 16 samples cannot be used"):
        prepare(sources, max_dropped_share=0.2)


def test_rows_of_an_unknown_number_are_counted_at_the_end(mix, monkeypatch, caplog):
    """As of the Hub's streams: some bad rows may be few of all; nothing but bad rows stops at once."""
    bad = [{"messages": [said("user", "q")], "images": []}] * 300
    good = [{"messages": [said("user", "q"), said("assistant", "a")], "images": []}] * 100
    monkeypatch.setattr(row_sources.DataSource, "num_taken", lambda source, num_rows: None)
    Path("mixed.jsonl").write_text("\n".join(map(json.dumps, [*good, *bad[:20]])))
    with caplog.at_level("WARNING"):
        _, manifest = prepare([source(path="mixed.jsonl")], max_dropped_share=0.2)
    assert (manifest["num_samples"], manifest["num_dropped"]) == (100, 20)
    assert "20 of 120 samples cannot be used: 20 x no answer at the end; manifest.json lists them" in caplog.text
    with pytest.raises(PreparationError, match=r"mixed\.jsonl: 20 of 120 samples cannot be used, and .* allows 12"):
        prepare([source(path="mixed.jsonl")], max_dropped_share=0.1)
    Path("bad.jsonl").write_text("\n".join(map(json.dumps, bad)))
    stopped = r"bad\.jsonl: 128 of 128 samples \(of an unknown number, where preparation stopped\) cannot be used"
    with pytest.raises(PreparationError, match=stopped):
        prepare([source(path="bad.jsonl")], max_dropped_share=1.0)


def test_a_source_that_gives_no_row_is_an_error(mix):
    Path("empty.json").write_text("[]")
    for path, share in (("empty.json", None), ("data/chat.json", 0.1)):
        with pytest.raises(AnnotationsError, match=rf"data\[1\] {path}: no row is taken"):
            prepare([mix[0], source(path=path, share=share)])
    with pytest.raises(PreparationError, match=r"data\[0\]\.path: gone\.json does not exist"):
        prepare([source(path="gone.json")])
    with pytest.raises(PreparationError, match="images: gone is not a folder"):
        prepare([source(path="data/chat.json", images="gone")])


def test_held_out_conversations_stand_beside_sources(mix):
    held_out = json.loads(Path("data/chat.json").read_text())[:1]
    Path("held_out.json").write_text(json.dumps(held_out))
    sources = [source(path="data/chat.json", limit=1), source(path="data/cauldron", limit=1, images="own")]
    dataset, _ = prepare(sources, validation_annotations="held_out.json", images="data/images")
    assert load_from_disk("out/validation")["id"][:] == ["chat 0"]
    assert [str(Path(paths[0]).parents[-2]) for paths in dataset["images"]] == ["data", "own"]
    assert dataset[0]["images"] == ["data/images/a.png"]


def test_memory_is_not_asked_for_pictures_twice(mix):
    """Rows with the same picture name one file."""
    same = {"images": [{"bytes": picture("blue"), "path": None}], "texts": PAIRS}
    pq.write_table(pa.Table.from_pylist([same] * 200), "same.parquet")
    dataset, manifest = prepare([source(path="same.parquet")])
    assert len(dataset) == 200 and manifest["num_images"] == 1
    assert len({path for paths in dataset["images"] for path in paths}) == 1
    assert open_image(dataset[0]["images"][0]).getpixel((0, 0)) == Image.open(io.BytesIO(picture("blue"))).getpixel(
        (0, 0)
    )
