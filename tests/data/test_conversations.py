"""Reading of images and conversations: usable ones as LLaVA means them, unusable ones with a reason."""

import json

import pytest
from PIL import Image

from dualspeed.data import annotations
from dualspeed.data.annotations import count_entries, read_entries
from dualspeed.data.images import check_image, find_image, inspect_image, open_image
from dualspeed.errors import AnnotationsError, ImageError
from tests.support.samples import BAD_IMAGES, entry, load, load_file, write_image


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_a_bad_image_has_a_reason(kind, tmp_path):
    path = tmp_path / "image.png"
    write_image(path, kind)
    assert check_image(path) == BAD_IMAGES[kind]


def test_a_folder_is_no_image(tmp_path):
    assert check_image(tmp_path) == "missing"


@pytest.mark.parametrize("mode", ["CMYK", "P", "L", "LA", "RGBA", "1"])
def test_other_pixel_modes_are_converted_and_reported(mode, tmp_path):
    path = tmp_path / "image.png"
    write_image(path, mode)
    report = inspect_image(path)
    assert (report.reason, report.mode, report.height, report.width) == (None, mode, 30, 40)
    assert open_image(path).tobytes() == Image.open(path).convert("RGB").tobytes()


def test_a_photograph_is_opened_upright(tmp_path):
    photograph = Image.new("RGB", (40, 30), "red")
    exif = photograph.getexif()
    exif[0x0112] = 6  # EXIF's orientation: turn by 90 degrees
    photograph.save(tmp_path / "photograph.jpg", exif=exif)
    report = inspect_image(tmp_path / "photograph.jpg")
    assert (report.width, report.height) == open_image(tmp_path / "photograph.jpg").size == (30, 40)


def test_an_image_that_cannot_be_opened_is_named_with_its_reason(tmp_path):
    write_image(tmp_path / "image.png", "truncated")
    with pytest.raises(ImageError, match=r"image\.png: truncated or damaged"):
        open_image(tmp_path / "image.png")


def contents(record):
    """Content items of each turn; images as <image>."""
    return [[item["text"] or "<image>" for item in message["content"]] for message in record["messages"]]


@pytest.mark.parametrize(
    ("question", "items"),
    [
        ("<image>\nWhat?", ["<image>", "What?"]),
        ("What?\n<image>", ["<image>", "What?"]),
        ("Is <image> red?", ["<image>", "Is  red?"]),
        ("<image>", ["<image>"]),
        (" no image ", [" no image "]),
        ("<image>\n<image>\nWhich?", ["<image>", "<image>", "Which?"]),
        ("1: <image> 2: <image> Which?", ["1: ", "<image>", "2: ", "<image>", "Which?"]),
    ],
)
def test_image_marks_become_content_items(question, items, tmp_path):
    paths = [f"{index}.png" for index in range(question.count("<image>"))]
    records, problems = load(tmp_path, [entry(question, " the answer ", image=paths)])
    assert contents(records[0]) == [items, [" the answer "]]
    assert records[0]["images"] == [f"images/{path}" for path in paths]
    assert [message["role"] for message in records[0]["messages"]] == ["user", "assistant"]
    assert not problems


def test_one_image_is_a_path_and_ids_may_be_numbers_or_absent(tmp_path):
    entries = [entry("<image>", "a", name=7, image="a/b.png"), entry("q", "a", name=None)]
    records, _ = load(tmp_path, entries)
    assert [(record["id"], record["images"]) for record in records] == [("7", ["images/a/b.png"]), ("data.json:2", [])]


BAD_ENTRIES = {
    "number of <image> marks is not the number of images": [
        entry("q", "a", image="x.png"),
        entry("<image> q", "a"),
        entry("<image><image>", "a", image=["x.png"]),
    ],
    "<image> mark in an answer": [entry("q", "<image>", image="x.png")],
    "turns do not alternate": [
        entry("q"),
        entry(),
        {"id": "x", "conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "q"}]},
        {"id": "x", "conversations": [{"from": "human", "value": "q"}, {"from": "system", "value": "a"}]},
        {"id": "x", "conversations": ["q", "a"]},
    ],
    "empty answer": [entry("q", ""), entry("q", "a", "q", " \n")],
    "empty question": [entry("", "a")],
    "text is not a string": [entry("q", None), entry(3, "a")],
    "text is not valid Unicode": [entry("q", "\ud83d"), entry("q", "a", name="\ud83d")],
    "image is not a path": [entry("<image>", "a", image=3), entry("<image>", "a", image=[""])],
    "not a conversation": [{"id": "x"}, ["x"], {"id": "x", "conversations": "hello"}, None],
}


@pytest.mark.parametrize("reason", BAD_ENTRIES)
def test_a_bad_entry_is_listed_and_the_others_are_kept(reason, tmp_path):
    bad = BAD_ENTRIES[reason]
    records, problems = load(tmp_path, [entry("q", "a", name="good"), *bad])
    assert [record["id"] for record in records] == ["good"]
    assert [problem.reason for problem in problems] == [reason] * len(bad)
    assert problems[0].file == f"{tmp_path / 'data.json'}:2"


def test_a_malformed_line_is_named_by_its_number(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join([json.dumps(entry("q", "a")), "", '{"id": "torn', json.dumps(entry("q", "a"))]))
    records, (problem,) = load_file(path)
    assert len(records) == 2
    assert (problem.id, problem.file, problem.reason) == ("data.jsonl:3", f"{path}:3", "malformed JSON line")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b'[{"id": 1},\n {"id": 2', "line 2 is not valid JSON"),
        (b'[{"id": 1}\n\n {"id": 2}]', "line 3 is not valid JSON: Expecting one of"),
        (b"\x89PNG\r\n\x1a\n", "cannot be read as UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_clear_error(content, message, tmp_path):
    path = tmp_path / "data.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AnnotationsError, match=rf"data\.json: {message}"):
        count_entries(path)


@pytest.mark.parametrize("block_size", [1, 7, 1 << 20])
def test_a_list_is_read_the_same_in_blocks_of_any_size(block_size, tmp_path, monkeypatch):
    monkeypatch.setattr(annotations, "BLOCK_SIZE", block_size)
    entries = [{"id": "ü\n]," * 3, "x": [1, {"y": None}]}, 12345, "text", [], entry("q", "a")]
    for indent in (None, 2):
        (tmp_path / "data.json").write_text(f"\n {json.dumps(entries, indent=indent)} \n", encoding="utf-8")
        read = list(read_entries(tmp_path / "data.json"))
        assert [item.value for item in read] == entries
        assert [item.number for item in read] == [1, 2, 3, 4, 5]
    (tmp_path / "data.json").write_text("[ ]")
    assert count_entries(tmp_path / "data.json") == 0


def test_only_a_few_blocks_of_a_broken_list_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(annotations, "BLOCK_SIZE", 10)
    monkeypatch.setattr(annotations, "MAX_ENTRY_LENGTH", 100)
    (tmp_path / "data.json").write_text('[{"id": 1},\n {"id": "' + "x" * 10_000 + '"}]')
    with pytest.raises(AnnotationsError, match="line 2 is not valid JSON"):
        count_entries(tmp_path / "data.json")


def test_unpaired_turns_at_the_ends_are_left_out(tmp_path):
    chat = entry("q", "a", "q2")
    chat["conversations"].insert(0, {"from": "gpt", "value": "greeting"})
    (record,), problems = load(tmp_path, [chat])
    assert contents(record) == [["q"], ["a"]]
    assert not problems


@pytest.mark.parametrize("suffix", [".gif", ".png", ".jpeg"])
def test_an_image_under_another_suffix_is_found(suffix, tmp_path):
    (tmp_path / f"1.{suffix.strip('.')}").write_bytes(b"")
    assert find_image(tmp_path / "1.jpg") == tmp_path / f"1{suffix}"
    assert find_image(tmp_path / "2.jpg") == tmp_path / "2.jpg"
