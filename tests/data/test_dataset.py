"""Datasets of rows for a trainer: what is left out, where it is listed, and when it is too much."""

import io
import json
import logging
from contextlib import nullcontext

import datasets
import pytest
from PIL import Image
from torch.utils.data import IterableDataset

from dualspeed.data.dataset import Conversations, ConversationStream, Reading, read_conversations
from dualspeed.errors import AnnotationsError, PreparationError


def first(desc: str) -> nullcontext:
    return nullcontext()


def reading(folder, **settings) -> Reading:
    return Reading("train_dataset", folder / "out" / "dropped_rows_train.jsonl", **settings)


def png(colour: str = "red") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (20, 20), colour).save(content, format="PNG")
    return content.getvalue()


def row(number: int, **changes) -> dict:
    turns = [{"role": "user", "content": f"What is {number}?"}, {"role": "assistant", "content": "a square"}]
    return {"messages": turns, "image": Image.new("RGB", (20, 20))} | changes


BAD = {
    "truncated or damaged": {"image": png()[:-30]},
    "missing": {"image": "nowhere.png"},
    "image is an address": {"image": "https://example.org/a.png"},
    "empty answer": {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": " "}]},
}


def listed(settings: Reading) -> list[dict]:
    return [json.loads(line) for line in settings.file.read_text(encoding="utf-8").splitlines()]


def test_unusable_rows_are_left_out_counted_and_listed(tmp_path, caplog):
    rows = [row(0), *(row(1, **changes) for changes in BAD.values()), row(5)]
    settings = reading(tmp_path, max_dropped_share=0.7)
    with caplog.at_level(logging.WARNING):
        dataset = read_conversations(rows, settings, first)
    assert isinstance(dataset, Conversations)
    assert [record["messages"][0]["content"][-1]["text"] for record in dataset] == ["What is 0?", "What is 5?"]
    assert [entry["row"] for entry in listed(settings)] == [1, 2, 3, 4]
    assert {entry["reason"] for entry in listed(settings)} == set(BAD)
    (said,) = [record.message for record in caplog.records]
    assert said.startswith("train_dataset: 4 of 6 rows cannot be used: ") and str(settings.file) in said


def test_too_many_unusable_rows_are_an_error_that_shows_the_first(tmp_path):
    rows = [row(0), row(1, image="nowhere.png"), row(2), row(3)]
    expected = r"train_dataset: 1 of the first 4 rows .* max_dropped_share 0\.05 allows fewer: 1 x missing.*row 1"
    with pytest.raises(PreparationError, match=f"(?s){expected}"):
        read_conversations(rows, reading(tmp_path), first)


def test_a_file_of_an_earlier_run_says_nothing_about_this_one(tmp_path):
    read_conversations([row(0), row(1, image="gone.png")], reading(tmp_path, max_dropped_share=0.5), first)
    assert len(read_conversations([row(0), row(1)], reading(tmp_path), first)) == 2


def test_columns_without_a_meaning_are_an_error(tmp_path):
    rows = datasets.Dataset.from_list([{"question": "?", "answer": "!"}])
    with pytest.raises(AnnotationsError, match="train_dataset: has columns question, answer; valid: messages"):
        read_conversations(rows, reading(tmp_path), first)

    def to_messages(one):
        return [{"role": "user", "content": one["question"]}, {"role": "assistant", "content": one["answer"]}]

    (record,) = read_conversations(rows, reading(tmp_path, to_messages=to_messages), first)
    assert [message["role"] for message in record["messages"]] == ["user", "assistant"]


def test_images_of_hugging_face_datasets_are_decoded_by_our_rules(tmp_path):
    """The library would raise at the damaged one, and shows transparent pixels as black."""
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "prompt": datasets.Value("string"),
            "completion": datasets.Value("string"),
        }
    )
    rows = [
        {"images": [{"bytes": content, "path": None}], "prompt": "?", "completion": "!"}
        for content in (png(), png()[:-30])
    ]
    dataset = datasets.Dataset.from_list(rows, features=features)
    settings = reading(tmp_path, max_dropped_share=0.5)
    read = read_conversations(dataset, settings, first)
    assert len(read) == 1 and [entry["reason"] for entry in listed(settings)] == ["truncated or damaged"]
    assert isinstance(read[0]["images"][0], dict) and read[0]["images"][0]["bytes"] == png()


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows, self.epoch = rows, None

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter(self.rows)


def test_streams_are_read_row_by_row(tmp_path, caplog):
    rows = [row(number) for number in range(4)] + [row(4, image="nowhere.png")]
    settings = reading(tmp_path, max_dropped_share=0.2)
    stream = read_conversations(Stream(rows), settings, first)
    assert isinstance(stream, ConversationStream)
    stream.set_epoch(3)
    assert stream.rows.epoch == 3
    with caplog.at_level(logging.WARNING):
        assert len(list(stream)) == 4
    assert [entry["row"] for entry in listed(settings)] == [4]
    assert "1 of 5 rows cannot be used: 1 x missing" in caplog.text


def test_a_stream_of_unusable_rows_ends_with_an_error(tmp_path):
    stream = read_conversations(Stream([row(0, image="nowhere.png")] * 40), reading(tmp_path), first)
    with pytest.raises(PreparationError, match="train_dataset: 13 of the first 13 rows cannot be used"):
        list(stream)


def test_several_datasets_keep_their_names(tmp_path):
    settings = Reading("eval_dataset", tmp_path / "dropped_rows_eval.jsonl", max_dropped_share=0.5)
    sets = read_conversations({"a": [row(0)], "b": [row(0), row(1, image="nowhere.png")]}, settings, first)
    assert {name: len(rows) for name, rows in sets.items()} == {"a": 1, "b": 1}
    assert (tmp_path / "dropped_rows_eval_b.jsonl").exists() and not (tmp_path / "dropped_rows_eval_a.jsonl").exists()
