"""Reading of images and conversations: usable ones as LLaVA means them, unusable ones with a reason."""

import json
import re
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageCms

from dualspeed.data import annotations
from dualspeed.data.annotations import count_entries, read_entries
from dualspeed.data.images import find_image, inspect_image, open_image
from dualspeed.errors import AnnotationsError, ImageError
from tests.support.bad_entries import BAD_ENTRIES
from tests.support.parquet import parquet_rows, write_parquet
from tests.support.samples import BAD_IMAGES, entry, load, load_file, write_image


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_a_bad_image_has_a_reason(kind, tmp_path):
    path = tmp_path / "image.png"
    write_image(path, kind)
    assert inspect_image(path).reason == BAD_IMAGES[kind]


def test_a_folder_is_no_image(tmp_path):
    assert inspect_image(tmp_path).reason == "missing"


@pytest.mark.parametrize("mode", ["CMYK", "P", "L", "LA", "RGBA", "1"])
def test_other_pixel_modes_are_converted_and_reported(mode, tmp_path):
    path = tmp_path / "image.png"
    write_image(path, mode)
    report = inspect_image(path)
    assert (report.reason, report.mode, report.height, report.width) == (None, mode, 30, 40)
    assert open_image(path).tobytes() == Image.open(path).convert("RGB").tobytes()


def drawing(mode):
    """Black square on a transparent ground, 40 x 30 pixels, which is black too where alpha is left out."""
    image = Image.new("RGBA", (40, 30), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (10, 10, 20, 20))
    if mode == "P":  # as GIF and PNG hold it: one colour of the palette is transparent
        return image.quantize(4)
    return image.convert(mode)


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGBA", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("RGBA", "GIF"), ("RGBA", "WEBP")]
)
def test_transparency_becomes_white(mode, kind, tmp_path):
    drawing(mode).save(tmp_path / "drawing", format=kind, **({"lossless": True} if kind == "WEBP" else {}))
    opened = open_image(tmp_path / "drawing")
    assert opened.mode == "RGB"
    assert opened.getpixel((0, 0)) == (255, 255, 255) and opened.getpixel((15, 15)) == (0, 0, 0)


@pytest.mark.parametrize(("mode", "key"), [("L", 7), ("RGB", (7, 7, 7)), ("1", 0), ("I;16", 7)])
def test_a_transparent_colour_becomes_white(mode, key, tmp_path):
    image = Image.new(mode, (40, 30), key)
    image.save(tmp_path / "image.png", transparency=key)
    assert inspect_image(tmp_path / "image.png").mode == f"{mode} with a transparent colour"
    assert open_image(tmp_path / "image.png").getcolors() == [(1200, (255, 255, 255))]


def test_half_transparent_pixels_are_mixed_with_white(tmp_path):
    Image.new("RGBA", (4, 4), (200, 0, 0, 51)).save(tmp_path / "image.png")  # 51 of 255: a fifth
    assert open_image(tmp_path / "image.png").getpixel((0, 0)) == (244, 204, 204)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bits_are_scaled_to_8(suffix, tmp_path):
    values = np.array([[0, 128, 129, 257], [0x7FFF, 0x8000, 65407, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"image.{suffix}")
    assert inspect_image(tmp_path / f"image.{suffix}").reason is None
    red, green, blue = open_image(tmp_path / f"image.{suffix}").split()
    assert np.asarray(red).tolist() == [[0, 0, 1, 1], [127, 128, 255, 255]]
    assert red.tobytes() == green.tobytes() == blue.tobytes()


def test_of_an_animation_the_first_frame_is_used_and_listed(tmp_path):
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        frames[0].save(tmp_path / kind, format=kind, save_all=True, append_images=frames[1:], lossless=True)
        assert inspect_image(tmp_path / kind).mode.endswith("with several frames")
        assert open_image(tmp_path / kind).getpixel((0, 0)) == (255, 0, 0)


def swapped_profile():
    """A colour profile of sRGB with red and blue exchanged, so that applying it is plain to see."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = content.index(b"rXYZ"), content.index(b"bXYZ")
    content[red : red + 4], content[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(content)


def test_colours_with_a_profile_become_srgb(tmp_path):
    image, profile = Image.new("RGB", (40, 30), (250, 10, 10)), swapped_profile()
    for kind in ("PNG", "JPEG"):
        image.save(tmp_path / kind, format=kind, icc_profile=profile)
        assert inspect_image(tmp_path / kind).mode == "RGB with a colour profile"
        red, green, blue = open_image(tmp_path / kind).getpixel((0, 0))
        assert blue > 240 and red < 20 and green < 20
    clear = Image.new("RGBA", (40, 30), (250, 10, 10, 0))
    clear.save(tmp_path / "clear.png", icc_profile=profile)
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    "profile", [None, b"no profile", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()]
)
def test_a_plain_image_is_opened_byte_for_byte(profile, tmp_path):
    """With no profile, one that can't be read, or sRGB itself; transformers' own loader gives the same pixels."""
    image = Image.effect_noise((40, 30), 80).convert("RGB")
    image.save(tmp_path / "image.png", icc_profile=profile)
    assert open_image(tmp_path / "image.png").tobytes() == image.tobytes()
    assert inspect_image(tmp_path / "image.png").mode == "RGB"


@pytest.mark.filterwarnings("error")
def test_large_images_are_measured_by_the_setting_alone(tmp_path):
    """Pillow itself warns above 89 million pixels and fails above 179 million."""
    path = tmp_path / "large.png"
    Image.new("1", (10_000, 9_000)).save(path)
    assert inspect_image(path, max_pixels=90_000_000).reason is None
    report = inspect_image(path, max_pixels=89_999_999)
    assert (report.reason, report.detail) == ("too large", "10000 x 9000 pixels; max_image_pixels is 89999999")
    write_image(path, "too large")
    assert inspect_image(path, max_pixels=10**9).reason is None


def test_an_image_of_two_other_suffixes_is_missing(tmp_path):
    for suffix in (".png", ".gif"):
        write_image(tmp_path / f"1{suffix}", "RGB")
    assert find_image(tmp_path / "1.jpg") == tmp_path / "1.jpg"


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


@pytest.mark.parametrize("reason", BAD_ENTRIES)
def test_a_bad_entry_is_listed_and_the_others_are_kept(reason, tmp_path):
    bad = BAD_ENTRIES[reason]
    records, problems = load(tmp_path, [entry("q", "a", name="good"), *bad])
    assert [record["id"] for record in records] == ["good"]
    assert [problem.reason for problem in problems] == [reason] * len(bad)
    assert problems[0].file == f"{tmp_path / 'data.json'}:2"


@pytest.mark.parametrize(
    ("bad", "detail"),
    [
        (entry("<IMAGE>\nq", "a", image="x.png"), "0 x <image> and <IMAGE>, 1 images; valid: <image>, just so"),
        (entry("<image 1> <image 2>", "a", image=["x", "y"]), "0 x <image> and <image 1>, <image 2>, 2 images;"),
        (entry("<|image|> q", "a", image="x.png"), "0 x <image> and <|image|>, 1 images;"),
        (entry("<image><image>", "a", image="x.png"), "2 x <image>, 1 images; valid: <image>, just so"),
        ({**entry("q", "a"), "images": ["x.png"]}, "key 'images'; valid: `image`, a path or a list of paths"),
        ({"id": "x", "messages": []}, "keys id, messages; valid: an object with a list `conversations`"),
        (entry("<image>", "a", image="a\\b.png"), r"'a\\b.png'; valid: / between its parts"),
        (entry("<image>", "a", image={"bytes": "b" * 5000}), "'bbb... (5013 characters); valid: a path, a list"),
    ],
)
def test_a_problem_says_what_was_seen_and_what_is_valid(bad, detail, tmp_path):
    _, (problem,) = load(tmp_path, [entry("q", "a"), bad])
    assert detail in re.sub("b{20,}", "bbb", problem.detail)


@pytest.mark.parametrize("path", ["a.png", "a/b c.png", "./a.png", "ä/🙂.png", "a..b/c...png", "0000/" * 60 + "x.png"])
def test_paths_below_the_folder_are_taken_letter_by_letter(path, tmp_path):
    (record,), problems = load(tmp_path, [entry("<image>", "a", image=path)])
    assert record["images"] == [str(Path("images") / path)] and not problems


def test_other_keys_and_words_about_images_are_no_problem(tmp_path):
    chat = {**entry("What does <img src='x'> do, and <video>?", "a"), "images": [], "video": None, "image_id": 3}
    pictured = {**entry("<image>\nIn <image 1>?", "a", image="x.png"), "image_path": "elsewhere/x.png"}
    records, problems = load(tmp_path, [chat, pictured])
    assert len(records) == 2 and not problems


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
        (b'[{"id": 1},\n\n{"id": ' + b"1" * 5000 + b"}]", "the entry at line 1 cannot be read: Exceeds the limit"),
        (
            b'[{"id": ' + b"[" * 100_000 + b"]" * 100_000 + b"}]",
            "the entry at line 1 cannot be read: maximum recursion",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_one_clear_error(content, message, tmp_path):
    path = tmp_path / "data.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AnnotationsError, match=rf"data\.json: {message}"):
        count_entries(path)


def test_a_line_that_python_cannot_hold_is_one_bad_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(['{"id": ' + "1" * 5000 + "}", "[" * 100_000, json.dumps(entry("q", "a"))]))
    records, problems = load_file(path)
    assert len(records) == 1 and [problem.reason for problem in problems] == ["malformed JSON line"] * 2


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


def test_a_parquet_file_that_holds_fewer_rows_than_it_states_is_an_error(tmp_path, monkeypatch):
    write_parquet(tmp_path, parquet_rows(), "data.parquet")
    whole = pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *a, **k: islice(whole(*a, **k), 0))
    with pytest.raises(AnnotationsError, match=r"data\.parquet: is damaged: it states 5 rows and holds 0"):
        load_file(tmp_path / "data.parquet")


def test_a_parquet_file_with_a_column_that_is_no_text_is_one_clear_error(tmp_path):
    write_parquet(tmp_path, parquet_rows(), "data.parquet")
    content = (tmp_path / "data.parquet").read_bytes()
    (tmp_path / "data.parquet").write_bytes(content.replace(b"data_source", b"\xe3ata_source"))
    with pytest.raises(AnnotationsError, match=r"data\.parquet: cannot be read as parquet: 'utf-8'"):
        load_file(tmp_path / "data.parquet")


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
