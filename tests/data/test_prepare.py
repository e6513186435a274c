"""Preparation of data: a dataset of all usable samples and a manifest of the others, complete or not at all."""

import hashlib
import io
import json
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_from_disk
from PIL import Image
from transformers import AutoProcessor, LlavaProcessor

from dualspeed.batch import IGNORE_INDEX
from dualspeed.chat_templates import use_template
from dualspeed.data.collator import ConversationCollator
from dualspeed.data.conversations import Problem
from dualspeed.data.images import inspect_image, open_image
from dualspeed.data.lengths import choose_method, tokens_by_pixels, tokens_by_size, truncated_length
from dualspeed.data.prepare import prepare_dataset
from dualspeed.errors import AnnotationsError, PreparationError
from dualspeed.layout import VALIDATION_FOLDER
from dualspeed.settings.recipe import DataRecipe
from tests.support import tiny
from tests.support.parquet import parquet_rows, write_parquet
from tests.support.samples import BAD_IMAGES, by_character, entry, load, write_image


@pytest.fixture(scope="module")
def models_folder(tmp_path_factory):
    """Folders llava and llava_next, each with a processor whose tokens are characters."""
    folder = tmp_path_factory.mktemp("models")
    by_character(make=tiny.llava_processor).save_pretrained(folder / "llava")
    by_character(make=tiny.llava_next_processor).save_pretrained(folder / "llava_next")
    return folder


def make_recipe(folder, entries, **settings):
    """Return a recipe for `entries` and the images in `folder`/images."""
    (folder / "images").mkdir(exist_ok=True)
    (folder / "data.json").write_text(json.dumps(entries))
    settings = {"chat_template": "turns", "max_length": 400, "max_dropped_share": 0.9, **settings}
    return DataRecipe(annotations=str(folder / "data.json"), images=str(folder / "images"), **settings)


def good_entries(folder):
    """Return usable entries of each kind; writes their images, which have different shapes."""
    (folder / "images").mkdir(exist_ok=True)
    for name, size in {"a.png": (28, 28), "b.png": (90, 20), "c.png": (20, 70)}.items():
        Image.new("RGB", size, "red").save(folder / "images" / name)
    return [
        entry("<image>\nq", "a", "q2", "a2", name="one", image="a.png"),
        entry("q", "a", name="text"),
        entry("1: <image> 2: <image>", "a long answer", name="two", image=["b.png", "c.png"]),
    ]


def test_held_out_samples_are_prepared_beside_those_to_train_on(models_folder, tmp_path):
    *entries, held_out = good_entries(tmp_path)
    (tmp_path / "held_out.json").write_text(json.dumps([held_out]))
    recipe = make_recipe(tmp_path, entries, validation_annotations=str(tmp_path / "held_out.json"))
    prepare_dataset(recipe, models_folder / "llava", tmp_path / "out")
    assert load_from_disk(tmp_path / "out")["id"][:] == ["one", "text"]
    assert load_from_disk(tmp_path / "out" / VALIDATION_FOLDER)["id"][:] == ["two"]

    (tmp_path / "held_out.json").unlink()
    with pytest.raises(PreparationError, match=r"held_out\.json does not exist"):
        prepare_dataset(recipe, models_folder / "llava", tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("model", ["llava", "llava_next"])
def test_prepared_rows_are_as_long_as_the_collator_makes_them(model, workers, models_folder, tmp_path):
    recipe = make_recipe(tmp_path, good_entries(tmp_path))
    manifest = prepare_dataset(recipe, models_folder / model, tmp_path / "out", workers)
    dataset = load_from_disk(tmp_path / "out")
    assert dataset["id"][:] == ["one", "text", "two"]
    processor = AutoProcessor.from_pretrained(models_folder / model)
    use_template(processor, "turns")
    batch = ConversationCollator(processor, recipe.max_length)(list(dataset))
    assert dataset["num_tokens"][:] == batch["attention_mask"].sum(dim=1).tolist()
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["num_samples"], manifest["num_dropped"], manifest["dropped"]) == (3, 0, [])


def test_everything_unusable_is_counted_and_listed(models_folder, tmp_path):
    entries = good_entries(tmp_path)
    for kind in [*BAD_IMAGES, "CMYK", "P"]:
        write_image(tmp_path / "images" / f"{kind}.png", kind)
        entries.append(entry("<image>", "a", name=kind, image=f"{kind}.png"))
    entries += [
        entry("<image>\n" + "q" * 300, "a", name="long question", image="a.png"),
        entry("q" * 300 + "<image><image>", "a", name="late image", image=["a.png", "b.png"]),
        entry("q", "a" * 300, name="long answer"),
        entry("q", "", name="no answer"),
    ]
    recipe = make_recipe(tmp_path, entries, max_length=150)
    manifest = prepare_dataset(recipe, models_folder / "llava", tmp_path / "out", workers=2)
    dataset = load_from_disk(tmp_path / "out")
    assert dataset["id"][:] == ["one", "text", "two", "CMYK", "P", "long answer"]
    assert dataset["num_tokens"][-1] == 150
    assert manifest["num_cut_at_max_length"] == 1
    assert {item["id"]: item["reason"] for item in manifest["dropped"]} == {
        **{kind: f"image: {reason}" for kind, reason in BAD_IMAGES.items()},
        "long question": "nothing supervised within max_length",
        "late image": "image tokens beyond max_length",
        "no answer": "empty answer",
    }
    assert manifest["num_dropped"] == len(manifest["dropped"]) == sum(manifest["dropped_by_reason"].values())
    assert manifest["dropped_by_reason"]["image: too small"] == 2
    assert manifest["converted_by_mode"] == {"converted from CMYK": 1, "converted from P": 1}
    assert [Path(item["file"]).name for item in manifest["converted"]] == ["CMYK.png", "P.png"]


def test_samples_that_a_template_cannot_hold_are_dropped(models_folder, tmp_path):
    recipe = make_recipe(tmp_path, good_entries(tmp_path)[1:], chat_template="plain")
    manifest = prepare_dataset(recipe, models_folder / "llava", tmp_path / "out")
    assert [(item["id"], item["reason"]) for item in manifest["dropped"]] == [("text", "not for this chat template")]


def test_an_image_is_opened_once_however_often_it_is_asked_about(models_folder, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(
        "dualspeed.data.prepare.inspect_image", lambda path, *limit: opened.append(path) or inspect_image(path, *limit)
    )
    entries = [entry("<image>\nq", "a", name=str(index), image="a.png") for index in range(300)]
    recipe = make_recipe(tmp_path, [*good_entries(tmp_path), *entries])
    manifest = prepare_dataset(recipe, models_folder / "llava", tmp_path / "out", workers=2)
    assert manifest["num_samples"] == 303
    assert sorted(path.name for path in opened) == ["a.png", "b.png", "c.png"]


def test_images_under_another_suffix_are_found_and_listed(models_folder, tmp_path):
    entries = good_entries(tmp_path)[:1]
    Image.new("P", (30, 30)).save(tmp_path / "images/ocr.gif")
    recipe = make_recipe(tmp_path, [*entries, entry("<image>\nq", "a", image="ocr.jpg")])
    manifest = prepare_dataset(recipe, models_folder / "llava", tmp_path / "out")
    folder = tmp_path / "images"
    assert load_from_disk(tmp_path / "out")["images"][:] == [[str(folder / "a.png")], [str(folder / "ocr.gif")]]
    assert manifest["renamed"] == [{"file": str(folder / "ocr.jpg"), "found": str(folder / "ocr.gif")}]


def test_preparation_stops_once_too_much_is_unusable(models_folder, tmp_path):
    lost = [entry("<image>", "a", name=str(index), image="lost.png") for index in range(600)]
    with pytest.raises(PreparationError, match=r"data\.json: 128 of 128 samples \(of 603, where preparation stopped\)"):
        prepare_dataset(
            make_recipe(tmp_path, [*lost, *good_entries(tmp_path)], max_dropped_share=0.1),
            models_folder / "llava",
            tmp_path / "out",
        )


def test_too_large_a_share_of_bad_samples_is_an_error(models_folder, tmp_path):
    entries = [*good_entries(tmp_path), entry("<image>", "a", name="lost", image="lost.png")]
    recipe = make_recipe(tmp_path, entries, max_dropped_share=0.2)
    message = r"(?s)1 of 4 samples.*max_dropped_share 0\.2 allows 0: 1 x image: missing.*lost: .*lost\.png"
    with pytest.raises(PreparationError, match=message):
        prepare_dataset(recipe, models_folder / "llava", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    manifest = prepare_dataset(
        make_recipe(tmp_path, entries, max_dropped_share=0.25), models_folder / "llava", tmp_path
    )
    assert manifest["num_dropped"] == 1


def test_data_without_any_usable_sample_is_an_error(models_folder, tmp_path):
    recipe = make_recipe(tmp_path, [entry("<image>", "a", image="lost.png")], max_dropped_share=1.0)
    with pytest.raises(PreparationError, match="1 of 1 samples cannot be used"):
        prepare_dataset(recipe, models_folder / "llava", tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"", AnnotationsError, r"data\.json: has no entry"),
        (b"[]", AnnotationsError, r"data\.json: has no entry"),
        (b"<html>404</html>", PreparationError, r"data\.json: 1 of 1 samples cannot be used.*1 x malformed JSON line"),
    ],
)
def test_a_file_without_conversations_is_one_clear_error(content, error, message, models_folder, tmp_path):
    recipe = make_recipe(tmp_path, [])
    Path(recipe.annotations).write_bytes(content)
    with pytest.raises(error, match=message):
        prepare_dataset(recipe, models_folder / "llava", tmp_path / "out")


@pytest.mark.parametrize("model", ["llava", "llava_next"])
def test_parquet_rows_become_files_and_a_dataset(model, models_folder, tmp_path):
    rows = parquet_rows()
    write_parquet(tmp_path / "data", rows, "train-00000-of-00002.parquet")
    write_parquet(tmp_path / "data", rows[:2], "train-00001-of-00002.parquet")
    images = tmp_path / "images"
    settings = {"chat_template": "turns", "max_length": 400, "max_dropped_share": 0.5}
    recipe = DataRecipe(annotations=str(tmp_path / "data"), images=str(images), **settings)
    manifest = prepare_dataset(recipe, models_folder / model, tmp_path / "out", workers=2)
    dataset = load_from_disk(tmp_path / "out")
    assert dataset["id"][:] == ["jpeg", "text", "png", "jpeg", "text"]
    first, second = images / "train-00000-of-00002", images / "train-00001-of-00002"
    jpeg, _, png, *_ = (row["image"] and hashlib.sha256(row["image"]["bytes"]).hexdigest()[:16] for row in rows)
    files = [[first / f"0000000-{jpeg}.jpg"], [], [first / f"0000002-{png}.png"], [second / f"0000000-{jpeg}.jpg"], []]
    assert dataset["images"][:] == [[str(path) for path in paths] for paths in files]
    processor = AutoProcessor.from_pretrained(models_folder / model)
    use_template(processor, "turns")
    batch = ConversationCollator(processor)(list(dataset))
    assert dataset["num_tokens"][:] == batch["attention_mask"].sum(dim=1).tolist()
    assert manifest["dropped_by_reason"] == {
        "image: truncated or damaged": 1,
        "number of <image> marks is not the number of images": 1,
    }
    before = {path: path.stat().st_mtime_ns for path in images.rglob("*.*")}
    prepare_dataset(recipe, models_folder / model, tmp_path / "again")
    assert {path: path.stat().st_mtime_ns for path in images.rglob("*.*")} == before


def picture_rows(colour):
    """One sample whose image has the same number of bytes in every colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), colour).save(buffer, format="BMP")
    return [entry("<image>\nq", "a", name=colour, image={"bytes": buffer.getvalue(), "path": None})]


def colours_of(dataset):
    """Id of each sample, and the colour of its image."""
    return {row["id"]: open_image(row["images"][0]).getpixel((0, 0)) for row in dataset}


def test_parquet_files_of_one_name_keep_their_own_images(models_folder, tmp_path):
    """As LLaVA-OneVision-Data is laid out, one folder a subset; with held-out data that shares the folder of images."""
    for colour, folder in {"red": "data/one", "lime": "data/two", "blue": "held_out/one", "black": "data"}.items():
        write_parquet(tmp_path / folder, picture_rows(colour))
    settings = {"chat_template": "turns", "validation_annotations": str(tmp_path / "held_out")}
    recipe = DataRecipe(annotations=str(tmp_path / "data"), images=str(tmp_path / "images"), **settings)
    prepare_dataset(recipe, models_folder / "llava", tmp_path / "out", workers=2)
    trained = load_from_disk(tmp_path / "out")
    assert colours_of(trained) == {"red": (255, 0, 0), "lime": (0, 255, 0), "black": (0, 0, 0)}

    # Another stage with the same folder of images, and a file of the old name and size, leave all that is there.
    write_parquet(tmp_path / "data/one", picture_rows("white"))
    other = DataRecipe(annotations=str(tmp_path / "data"), images=str(tmp_path / "images"), chat_template="turns")
    prepare_dataset(other, models_folder / "llava", tmp_path / "other")
    assert colours_of(load_from_disk(tmp_path / "other"))["white"] == (255, 255, 255)
    assert colours_of(trained) == {"red": (255, 0, 0), "lime": (0, 255, 0), "black": (0, 0, 0)}
    assert colours_of(load_from_disk(tmp_path / "out" / VALIDATION_FOLDER)) == {"blue": (0, 0, 255)}


def test_a_torn_image_of_an_earlier_preparation_is_written_again(models_folder, tmp_path):
    write_parquet(tmp_path / "data", picture_rows("red"))
    recipe = DataRecipe(annotations=str(tmp_path / "data"), images=str(tmp_path / "images"), chat_template="turns")
    prepare_dataset(recipe, models_folder / "llava", tmp_path / "out")
    (file,) = (tmp_path / "images").rglob("*.*")
    file.write_bytes(bytes(file.stat().st_size))
    prepare_dataset(recipe, models_folder / "llava", tmp_path / "out")
    assert colours_of(load_from_disk(tmp_path / "out")) == {"red": (255, 0, 0)}


def test_a_name_that_no_file_can_have_is_one_bad_row(models_folder, tmp_path):
    entries = [*good_entries(tmp_path), entry("<image>", "a", name="long", image="x" * 300 + ".png")]
    entries.append(entry("<image>", "a", name="zero", image="x\0.png"))
    manifest = prepare_dataset(make_recipe(tmp_path, entries), models_folder / "llava", tmp_path / "out")
    reasons = {item["id"]: (item["reason"], item["detail"]) for item in manifest["dropped"]}
    assert reasons["long"] == ("image: cannot be read", "File name too long")
    assert reasons["zero"][0] == "image: missing" and manifest["num_samples"] == 3


def test_an_error_of_input_is_not_one_of_output(models_folder, tmp_path, monkeypatch):
    def fail(path, max_pixels):
        raise OSError(5, "Input/output error", path)

    monkeypatch.setattr("dualspeed.data.prepare.inspect_image", fail)
    recipe = make_recipe(tmp_path, good_entries(tmp_path))
    with pytest.raises(PreparationError, match=r"data\.json: its samples cannot be read: .*Input/output error"):
        prepare_dataset(recipe, models_folder / "llava", tmp_path / "out")


def test_images_that_cannot_be_written_are_named(models_folder, tmp_path):
    write_parquet(tmp_path / "data", picture_rows("red"))
    (tmp_path / "images").mkdir()
    (tmp_path / "images/train-00000-of-00001").write_text("a file in the folder's place")
    recipe = DataRecipe(annotations=str(tmp_path / "data"), images=str(tmp_path / "images"), chat_template="turns")
    with pytest.raises(PreparationError, match=r"images: .*train-00000-of-00001.* cannot be written"):
        prepare_dataset(recipe, models_folder / "llava", tmp_path / "out")


def test_the_manifest_changes_with_the_content_of_an_image(models_folder, tmp_path):
    recipe = make_recipe(tmp_path, good_entries(tmp_path))
    before = prepare_dataset(recipe, models_folder / "llava", tmp_path / "out")
    assert before["num_images"] == 3
    Image.new("RGB", (28, 28), "lime").save(tmp_path / "images/a.png")
    after = prepare_dataset(recipe, models_folder / "llava", tmp_path / "out")
    assert before.pop("images_sha256") != after.pop("images_sha256")
    assert before == after


def test_the_limit_of_pixels_is_a_setting(models_folder, tmp_path):
    recipe = make_recipe(tmp_path, good_entries(tmp_path), max_image_pixels=1500)
    manifest = prepare_dataset(recipe, models_folder / "llava", tmp_path / "out")
    (dropped,) = manifest["dropped"]
    assert dropped == {
        "id": "two",
        "file": str(tmp_path / "images/b.png"),
        "reason": "image: too large",
        "detail": "90 x 20 pixels; max_image_pixels is 1500",
    }


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda folder: None, "no parquet file in this folder"),
        (lambda folder: (folder / "a.parquet").write_text("<html>"), r"a\.parquet: cannot be read as parquet"),
        (
            lambda folder: pq.write_table(pa.table({"text": ["q"]}), folder / "a.parquet"),
            r"a\.parquet: has columns text; valid: id, image, conversations",
        ),
    ],
)
def test_a_folder_that_is_no_parquet_data_is_one_clear_error(write, message, models_folder, tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data")
    recipe = DataRecipe(annotations=str(tmp_path / "data"), images=str(tmp_path / "images"))
    with pytest.raises(AnnotationsError, match=message):
        prepare_dataset(recipe, models_folder / "llava", tmp_path / "out")


@pytest.mark.parametrize("missing", ["annotations", "images", "model"])
def test_a_missing_input_is_named_at_once(missing, models_folder, tmp_path):
    recipe = make_recipe(tmp_path, good_entries(tmp_path))
    model = models_folder / "llava"
    if missing == "model":
        model = tmp_path / "gone"
    else:
        recipe = DataRecipe(**{"annotations": recipe.annotations, "images": recipe.images, missing: "gone"})
    with pytest.raises(PreparationError, match=rf"{missing}: .*gone"):
        prepare_dataset(recipe, model, tmp_path / "out")


@pytest.mark.parametrize("make", [tiny.llava_processor, tiny.llava_next_processor])
def test_counting_by_size_agrees_with_the_pixels(make, tmp_path):
    processor = by_character("vicuna_v1", make)
    records, _ = load(tmp_path, good_entries(tmp_path), tmp_path / "images")
    reports = {path: inspect_image(path) for record in records for path in record["images"]}
    assert choose_method(processor, records[0], reports) is tokens_by_size
    both = (tokens_of(processor, records, reports) for tokens_of in (tokens_by_size, tokens_by_pixels))
    for quick, exact in zip(*both, strict=True):
        assert quick.is_image.repeat(quick.widths).tolist() == exact.is_image.tolist()
        assert quick.is_supervised.repeat(quick.widths).tolist() == exact.is_supervised.tolist()


def test_a_sample_is_dropped_at_just_the_lengths_that_the_collator_cannot_use(tmp_path):
    processor = by_character("turns")
    records, _ = load(tmp_path, good_entries(tmp_path)[2:], tmp_path / "images")
    reports = {path: inspect_image(path) for path in records[0]["images"]}
    (tokens,) = tokens_by_size(processor, records, reports)
    seen = set()
    for max_length in range(1, 90):
        length = truncated_length(records[0], tokens, max_length)
        collator = ConversationCollator(processor, max_length)
        if isinstance(length, Problem):
            seen.add(length.reason)
        if getattr(length, "reason", "") == "image tokens beyond max_length":
            with pytest.raises(ValueError, match="would cut image tokens"):
                collator(records)
            continue
        batch = collator(records)
        assert isinstance(length, Problem) == (batch["labels"] == IGNORE_INDEX).all()
        if not isinstance(length, Problem):
            assert length.num_tokens == batch["input_ids"].shape[1]
            seen.add("cut" if length.is_cut else "whole")
    assert len(seen) == 4  # image cut, nothing supervised, cut, whole


def test_a_processor_whose_count_by_size_is_wrong_is_measured_by_pixels(tmp_path):
    class Miscounting(LlavaProcessor):
        def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs):
            data = super()._get_num_multimodal_tokens(image_sizes, **kwargs)
            data.num_image_tokens = [count + 1 for count in data.num_image_tokens]
            return data

    processor = by_character("turns")
    processor.__class__ = Miscounting
    records, _ = load(tmp_path, good_entries(tmp_path), tmp_path / "images")
    reports = {path: inspect_image(path) for record in records for path in record["images"]}
    assert choose_method(processor, records[0], reports) is tokens_by_pixels


KILLED = """
import os, signal, sys
from datasets import Dataset
from dualspeed.data.prepare import prepare_dataset
from dualspeed.settings.recipe import DataRecipe

save = Dataset.save_to_disk

def save_and_die(dataset, folder):
    save(dataset, folder)
    os.kill(os.getpid(), signal.SIGKILL)

Dataset.save_to_disk = save_and_die
annotations, images, model, out = sys.argv[1:]
prepare_dataset(DataRecipe(annotations=annotations, images=images), model, out)
"""


def test_a_killed_preparation_leaves_what_was_there_before(models_folder, tmp_path):
    recipe = make_recipe(tmp_path, good_entries(tmp_path))
    model, out = models_folder / "llava", tmp_path / "out"
    prepare_dataset(recipe, model, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    command = [sys.executable, "-c", KILLED, recipe.annotations, recipe.images, model, out]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_full_disk_is_one_error_and_leaves_nothing_behind(models_folder, tmp_path):
    recipe = make_recipe(tmp_path, [entry("q", "a" * 100_000, name=str(index)) for index in range(2)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # larger files fail to be written, as on a full disk
    try:
        with pytest.raises(PreparationError, match=r"out: cannot be written: .*File too large"):
            prepare_dataset(recipe, models_folder / "llava", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name for path in tmp_path.iterdir()} == {"data.json", "images"}


def test_a_disk_that_is_too_small_is_an_error_at_the_start(models_folder, tmp_path, monkeypatch):
    recipe = make_recipe(tmp_path, good_entries(tmp_path))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(PreparationError, match="the disk has 0 MB left"):
        prepare_dataset(recipe, models_folder / "llava", tmp_path / "out")
