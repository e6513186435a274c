"""Rows in every format become the records that a person would write; all others are problems that say why."""

import copy
import json
import re
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from dualspeed.data.annotations import Entry
from dualspeed.data.conversations import Problem, read_record
from dualspeed.data.rows import check_columns, read_row
from dualspeed.errors import AnnotationsError
from tests.support.bad_entries import BAD_ENTRIES
from tests.support.mutations import mutated_values
from tests.support.paths import REPOSITORY
from tests.support.rows import (
    ANSWER,
    NO_IMAGE,
    ONE_IMAGE,
    PAIRS,
    QUESTION,
    REST,
    SAME,
    picture,
    said,
    text,
    with_images,
)
from tests.support.samples import assistant, entry, user

PIXELS = Image.new("RGB", (4, 3), "red")
SOURCES = ["a", b"content", {"bytes": b"content", "path": "x.png"}, PIXELS]
ASKED = said("user", QUESTION)
ITEM = {"type": "image"}


@pytest.mark.parametrize("name", SAME)
def test_the_same_conversation_in_any_format_is_the_same_record(name):
    row, messages, num_images = SAME[name]
    for image in SOURCES:
        if image != "a" and "url" in name:
            continue
        given_row = with_images(row, image)
        before = repr(given_row)
        assert read_row(given_row, "rows:1") == {"id": "rows:1", "messages": messages, "images": [image] * num_images}
        assert repr(given_row) == before


@pytest.mark.parametrize("name", SAME)
def test_image_paths_start_from_the_folder_of_images(name):
    row, messages, num_images = SAME[name]
    record = read_row(row | {"id": 7}, "rows:1", Path("images"))
    assert record == {"id": "7", "messages": messages, "images": ["images/a"] * num_images}
    problem = read_row(with_images(row, "../a"), "rows:1", Path("images"))
    assert not num_images or problem.reason == "image path with .."


@pytest.mark.parametrize("reason", BAD_ENTRIES)
def test_a_row_of_llava_is_read_by_llavas_rules(reason):
    """The same records and the same problems, whichever way the row comes in."""
    entries = [entry("<image>\nq", "a", image="a.png"), entry("q", "a", "q"), *BAD_ENTRIES[reason]]
    for number, value in enumerate(entries):
        theirs = read_record(Entry(Path("data.json"), number, value), Path("images"))
        ours = read_row(value, f"data.json:{number}", Path("images"))
        turns = value.get("conversations") if isinstance(value, dict) else None
        if not (turns and isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns)):
            assert isinstance(theirs, Problem) and isinstance(ours, Problem)
        elif isinstance(theirs, Problem) and not isinstance(ours, Problem):
            assert reason == "images under another key" and ours["images"] == ["images/x.png"]
        elif isinstance(theirs, Problem) and all(turn.get("from") in ("human", "gpt") for turn in turns):
            assert (ours.reason, ours.detail) == (theirs.reason, theirs.detail) or "images" in value
        elif not isinstance(theirs, Problem):
            assert ours == theirs


BAD_ROWS = {
    "two formats in one row": [
        {"messages": [ASKED, *REST], "texts": PAIRS},
        {"prompt": "p", "completion": "c", "texts": PAIRS},
    ],
    "columns of no format": [{"text": "q"}, {}, {"prompt": "p"}, {"images": [PIXELS]}],
    "empty row": [{"messages": []}, {"texts": None, "images": []}, {"prompt": "", "completion": "a"}],
    "not a row": [["x"], None, "text"],
    "images under two keys": [{"messages": [ASKED, *REST], "image": "a", "images": ["a"]}],
    "images under another key": [
        {"messages": [ASKED, *REST], "img": "a.png"},
        {"messages": [ASKED, *REST], "Image": PIXELS},
        {"messages": [ASKED, *REST], "images": ["a"], "depth": PIXELS},
        {"messages": [ASKED, *REST], "screens": [{"bytes": picture(), "path": None}]},
        {"messages": [ASKED, *REST], "screens": [{"bytes": None, "path": "a.png"}]},
        {"messages": [ASKED, *REST], "raw": picture()},
        {"messages": [ASKED, *REST], "pixels": np.zeros((2, 2, 3))},
        {"messages": [ASKED, *REST], "meta": {"thumbnail": [PIXELS]}},
        {"messages": [ASKED | {"images": ["a.png"]}, *REST]},
        {"messages": [said("user", [text(QUESTION) | {"image": PIXELS}]), *REST]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "depth": PIXELS},
        {"texts": [PAIRS[0] | {"image": "a.png"}]},
    ],
    "video or audio": [
        {"messages": [ASKED, *REST], "video": "a.mp4"},
        {"messages": [ASKED, *REST], "images": ["a"], "Audio": {"bytes": b"RIFF", "path": None}},
        {"messages": [said("user", [{"type": "video", "video": "a.mp4"}, text(QUESTION)]), *REST]},
    ],
    "image is an address": [
        {"messages": [ASKED, *REST], "images": ["https://example.org/a.png"]},
        {"messages": [said("user", [ITEM | {"url": "http://example.org/a.png"}]), *REST]},
        {"conversations": entry("<image>", "a")["conversations"], "images": ["http://example.org/a.png"]},
    ],
    "image is base64 text": [
        {"messages": [ASKED, *REST], "image": "iVBORw0KGgo/" * 40},
        {"messages": [ASKED, *REST], "image": {"bytes": "iVBORw0KGgo/", "path": None}},
    ],
    "image is a data: URL": [{"messages": [ASKED, *REST], "image": "data:image/png;base64,iVBO"}],
    "image is not one": [
        {"messages": [ASKED, *REST], "image": 3},
        {"messages": [ASKED, *REST], "images": ["a", None]},
        {"messages": [ASKED, *REST], "images": [{"bytes": None, "path": None}]},
        {"messages": [ASKED, *REST], "images": [b""]},
    ],
    "unknown content item": [
        {"messages": [said("user", [{"type": "image_url", "image_url": {"url": "data:"}}]), *REST]},
        {"messages": [said("user", [{"type": "Text", "text": "q"}]), *REST]},
    ],
    "content item without type": [
        {"messages": [said("user", ["q"]), *REST]},
        {"messages": [said("user", [{"text": "q"}]), *REST]},
    ],
    "image item with more than an image": [
        {"messages": [said("user", [ITEM | {"text": "q"}]), *REST], "images": ["a"]}
    ],
    "two texts in one item": [{"messages": [said("user", [text("q") | {"content": "r"}]), *REST]}],
    "images given in two ways": [
        {"messages": [said("user", [ITEM | {"image": "a"}, text("q")]), *REST], "images": ["a"]},
        {"messages": [said("user", [ITEM | {"image": "a"}, ITEM]), *REST]},
    ],
    "images placed in two ways": [{"messages": [said("user", [ITEM, text("<image> q")]), *REST], "images": ["a"]}],
    "images in another order": [
        {"messages": [said("user", [ITEM | {"index": 1}, ITEM | {"index": 0}]), *REST], "images": ["a", "b"]}
    ],
    "number of image items is not the number of images": [
        {"messages": [said("user", [ITEM, text("q")]), *REST]},
        {"messages": [said("user", [ITEM, text("q")]), *REST], "images": ["a", "b"]},
    ],
    "number of <image> marks is not the number of images": [
        {"messages": [said("user", "What is <image>?"), *REST]},
        {"texts": [{"user": "<image><image>", "assistant": "a"}], "images": ["a"]},
        {"conversations": entry("q", "a")["conversations"], "images": ["a"]},
    ],
    "an image in an answer": [{"messages": [ASKED, said("assistant", [ITEM])], "images": ["a"]}],
    "<image> mark in an answer": [{"messages": [ASKED, said("assistant", "<image>")], "images": ["a"]}],
    "<image> mark in a system turn": [{"messages": [said("system", "<image>"), ASKED, *REST], "images": ["a"]}],
    "unknown role": [
        {"messages": [said("User", "q"), *REST]},
        {"messages": [said("human", "q"), *REST]},
        {"messages": [said(["user"], "q"), *REST]},
        {"conversations": [{"from": "Human", "value": "q"}, {"from": "model", "value": "a"}]},
    ],
    "turn without `role`": [{"messages": [{"content": "q"}, *REST]}],
    "turn without `from`": [{"conversations": [{"value": "q"}, {"from": "model", "value": "a"}]}],
    "turn is not a message": [{"messages": ["q", "a"]}, {"conversations": [{"from": "user", "value": "q"}, "a"]}],
    "tool calls or audio": [
        {"messages": [ASKED, said("assistant", None) | {"tool_calls": [{"id": "1"}]}]},
        {"messages": [ASKED, said("assistant", "a"), said("tool", "b"), said("assistant", "c")]},
    ],
    "reasoning beside an answer": [{"messages": [ASKED, said("assistant", "a") | {"reasoning_content": "hm"}]}],
    "text is not a string": [
        {"messages": [ASKED, said("assistant", None)]},
        {"messages": [ASKED, said("assistant", [text(5)])]},
        {"texts": [{"user": "q", "assistant": 5}]},
    ],
    "text is not valid Unicode": [
        {"messages": [ASKED, said("assistant", "\ud83d")]},
        {"messages": [ASKED, *REST], "id": "\ud83d"},
    ],
    "system turn after the first turn": [
        {"messages": [said("system", "a"), said("system", "b"), ASKED, *REST]},
        {"messages": [ASKED, said("system", "b"), *REST]},
    ],
    "turns do not alternate": [
        {"messages": [ASKED, ASKED, *REST]},
        {"messages": REST},
        {"messages": [ASKED, *REST, said("assistant", "more")]},
        {"messages": [ASKED, ASKED]},
    ],
    "no answer at the end": [
        {"messages": [ASKED]},
        {"messages": [ASKED, *REST, ASKED]},
        {"messages": [said("system", "s")]},
        {"prompt": [ASKED], "completion": [said("assistant", "a"), ASKED]},
    ],
    "empty answer": [{"messages": [ASKED, said("assistant", " \n")]}, {"texts": [{"user": "q", "assistant": ""}]}],
    "empty question": [{"messages": [said("user", []), *REST]}, {"prompt": " ", "completion": "a"}],
    "answer in a prompt": [{"prompt": [ASKED, *REST[:2]], "completion": [said("assistant", "a")]}],
    "prompt and completion of other types": [{"prompt": [ASKED], "completion": "a"}],
    "texts are no pairs": [{"texts": ["q", "a"]}, {"texts": [{"user": "q"}]}, {"texts": "q"}],
    "no messages": [{"messages": "q"}, {"messages": {"role": "user"}}],
}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_a_row_that_cannot_be_used_says_why(reason):
    for row in BAD_ROWS[reason]:
        problem = read_row(row, "rows:3")
        assert isinstance(problem, Problem), problem
        assert problem.reason == reason, problem
        assert problem.file == "rows:3" and problem.detail
        assert len(problem.detail) < 500


@pytest.mark.parametrize("name", SAME)
def test_a_row_may_be_any_mapping(name):
    """As `datasets` hands rows to functions, which reads a column when it is asked for."""
    row, messages, num_images = SAME[name]
    record = read_row(MappingProxyType(row), "rows:1")
    assert record == {"id": "rows:1", "messages": messages, "images": ["a"] * num_images}


def test_columns_that_say_something_else_are_left_out():
    row = {"messages": [ASKED, *REST], "images": ["a"], "image_path": "elsewhere/a.png", "score": 3, "tags": ["x"]}
    assert read_row(row, "rows:1")["messages"] == ONE_IMAGE
    assert read_row({"messages": [ASKED, REST[0]], "video": None, "images": [], "img": ""}, "r")["messages"] == NO_IMAGE


def test_a_format_that_is_named_is_read():
    row = {"messages": [ASKED, REST[0]], "texts": PAIRS}
    assert read_row(row, "rows:1", row_format="messages")["messages"] == NO_IMAGE
    assert read_row({"messages": [ASKED]}, "rows:1", row_format="texts").reason == "empty row"


def test_any_row_is_read_by_a_function_of_the_caller():
    row = {"question": QUESTION, "answer": ANSWER, "image": PIXELS, "id": "x"}

    def asked(row, content):
        return [said("user", content), said("assistant", row["answer"])]

    of_row = {"id": "x", "messages": [ONE_IMAGE[0], ONE_IMAGE[1]], "images": [PIXELS]}
    own = [ITEM | {"image": PIXELS}, text(QUESTION)]
    assert read_row(row, "rows:1", to_messages=lambda row: asked(row, row["question"])) == of_row
    assert read_row(row, "rows:1", to_messages=lambda row: asked(row, own)) == of_row
    pair = {"images": [PIXELS], "texts": PAIRS[:1]}
    assert read_row(row, "rows:1", to_messages=lambda row: pair) == of_row
    failed = read_row(row, "rows:1", to_messages=lambda row: row["lost"])
    assert (failed.reason, failed.detail) == ("to_messages failed", "KeyError: \"'lost'\"")
    assert read_row(row, "rows:1", to_messages=lambda row: None).reason == "to_messages gave no messages"
    assert read_row(row, "rows:1", to_messages=lambda row: {"text": "q"}).reason == "columns of no format"


def test_columns_of_no_format_are_one_error_at_the_start():
    for columns in ("messages", "images"), ("prompt", "completion"), ("conversations",), ("texts", "images"):
        check_columns(columns)
    with pytest.raises(
        AnnotationsError, match="the dataset: has columns image, label; valid: messages; prompt and comp"
    ):
        check_columns(["image", "label"])
    with pytest.raises(AnnotationsError, match="x: has columns messages; valid: prompt and completion"):
        check_columns(["messages"], "x", "prompt_completion")


def test_the_rows_of_the_docs_are_one_conversation():
    """The JSON lines of docs/data.md, and its function."""
    page = (REPOSITORY / "docs/data.md").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in re.search(r"```json\n(.*?)```", page, flags=re.DOTALL)[1].splitlines()]
    records = [read_row(row, "row 1") | {"id": ""} for row in rows]
    scope: dict = {}
    exec(re.search(r"```python\n(.*?)```", page, flags=re.DOTALL)[1], scope)
    expected = {"id": "", "messages": [user("What is it?", 1), assistant("A cat.")], "images": ["cat.png"]}
    assert [*records, scope["record"] | {"id": ""}] == [expected] * 6


VALUES = [row for row, _, _ in SAME.values()] + [
    row for rows in BAD_ROWS.values() for row in rows if isinstance(row, dict)
]
VALUES = [row for row in VALUES if "pixels" not in row]


@seed(0)
@settings(max_examples=600, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(mutated_values(VALUES, most=4), max_size=5), st.sampled_from((None, Path("images"))))
def test_broken_rows_are_problems_and_all_are_counted(rows, folder):
    before = copy.deepcopy(rows)
    read = [read_row(row, f"rows:{number}", folder) for number, row in enumerate(rows)]
    problems = [item for item in read if isinstance(item, Problem)]
    records = [item for item in read if not isinstance(item, Problem)]
    assert len(records) + len(problems) == len(rows)
    assert shown(rows) == shown(before)
    for problem in problems:
        assert problem.reason and problem.detail
        json.dumps(problem.to_dict())
    for record in records:
        check_record(record)


ODD = (
    *(np.array([1, 2]), np.array(["a", "b"]), np.float64("nan"), np.zeros((2, 2, 3)), PIXELS, object(), range(3)),
    *(b"", bytearray(b"x"), memoryview(b"x"), {1: 2}, {"a"}, frozenset(), Path("a.png"), Exception, 3 + 4j, 10**5000),
)
"""Values that no JSON holds, of which some compare, print or convert in ways of their own."""


@pytest.mark.parametrize("name", SAME)
def test_values_of_any_type_are_problems_wherever_they_are(name):
    row = SAME[name][0]
    for number in range(num_places(row)):
        for value in ODD:
            changed = replaced(row, iter(range(number, -1, -1)), value)
            for folder in (None, Path("images")):
                read = read_row(changed, "rows:1", folder)
                assert isinstance(read, Problem) or check_record(read) is None
    for value in ODD:
        assert isinstance(read_row(value, "rows:1"), Problem)


def num_places(value):
    """Number of values in a tree, without its root."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(1 + num_places(part) for part in parts)


def replaced(value, left, other):
    """A tree with `other` in the place at which `left`, counted down, is 0."""
    if not isinstance(value, dict | list):
        return value
    pairs = [*value.items()] if isinstance(value, dict) else [*enumerate(value)]
    made = {key: other if next(left, None) == 0 else replaced(part, left, other) for key, part in pairs}
    return made if isinstance(value, dict) else [*made.values()]


def shown(rows):
    """Text of rows, images without their place in memory."""
    return re.sub(r" at 0x\w+", "", repr(rows))


def check_record(record):
    """A record is what everything behind the reader takes for granted."""
    assert record.keys() == {"id", "messages", "images"}
    roles = [message["role"] for message in record["messages"]]
    turns = roles[1:] if roles[0] == "system" else roles
    assert turns and turns == ["user", "assistant"] * (len(turns) // 2)
    items = [item for message in record["messages"] for item in message["content"]]
    assert all(message["content"] for message in record["messages"])
    assert all(item == {"type": "image", "text": None} or set(item) == {"type", "text"} for item in items)
    texts = [item["text"] for item in items if item["type"] == "text"]
    assert all(isinstance(value, str) for value in texts)
    "".join([record["id"], *texts]).encode()
    assert sum(item["type"] == "image" for item in items) == len(record["images"])
    assert all(isinstance(image, str | bytes | dict | Image.Image) for image in record["images"])
