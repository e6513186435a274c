"""The same conversations as rows in every format that people keep them in."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict
from PIL import Image

from tests.support.samples import assistant, user

QUESTION, ANSWER, SECOND, LAST = "Which is larger?", "The  first: é 🙂\n", "And then?", "Neither."
SYSTEM = "Be brief."


def picture(colour="red", kind="PNG", size=(30, 20)) -> bytes:
    """Content of an image file."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format=kind)
    return buffer.getvalue()


def text(value: str, key: str = "text", **padding: None) -> dict[str, Any]:
    """A content item of text."""
    return {"type": "text", key: value, **padding}


def said(role: str, content: Any) -> dict[str, Any]:
    """A message."""
    return {"role": role, "content": content}


def turns_of(*texts: str, speaker: str = "from", value: str = "value", names=("human", "gpt")) -> list[dict[str, str]]:
    """Alternating turns."""
    return [{speaker: names[number % 2], value: content} for number, content in enumerate(texts)]


ONE_IMAGE = [user(QUESTION, 1), assistant(ANSWER), user(SECOND), assistant(LAST)]
WITH_SYSTEM = [{"role": "system", "content": [{"type": "text", "text": SYSTEM}]}, *ONE_IMAGE]
NO_IMAGE = [user(QUESTION), assistant(ANSWER)]
TWO_IMAGES = [user("", 2), assistant(ANSWER)]
TWO_IMAGES[0]["content"] = [
    {"type": "text", "text": "1: "},
    {"type": "image", "text": None},
    {"type": "text", "text": "2: "},
    {"type": "image", "text": None},
]
IMAGE_FIRST = [text(None, image=None) | {"type": "image"}, text(QUESTION, image=None)]
REST = [said("assistant", ANSWER), said("user", SECOND), said("assistant", LAST)]
PAIRS = [{"user": QUESTION, "assistant": ANSWER, "source": "x"}, {"user": SECOND, "assistant": LAST, "source": "x"}]
MARKED = [f"<image>\n{QUESTION}", ANSWER, SECOND, LAST]

SAME: dict[str, tuple[dict[str, Any], list[dict[str, Any]], int]] = {
    "messages, strings": ({"messages": [said("user", QUESTION), *REST], "images": ["a"]}, ONE_IMAGE, 1),
    "messages, one image": ({"messages": [said("user", QUESTION), *REST], "image": "a"}, ONE_IMAGE, 1),
    "messages, items": ({"messages": [said("user", IMAGE_FIRST), *REST], "images": ["a"]}, ONE_IMAGE, 1),
    "messages, content items": (
        {"messages": [said("user", [{"type": "image", "index": 0}, text(QUESTION, "content")]), *REST], "image": ["a"]},
        ONE_IMAGE,
        1,
    ),
    "messages, images in items": (
        {"messages": [said("user", [{"type": "image", "image": "a", "text": None}, text(QUESTION)]), *REST]},
        ONE_IMAGE,
        1,
    ),
    "messages, paths in items": (
        {"messages": [said("user", [{"type": "image", "path": "a"}, text(QUESTION)]), *REST], "images": None},
        ONE_IMAGE,
        1,
    ),
    "messages, urls in items that are paths": (
        {"messages": [said("user", [{"type": "image", "url": "a"}, text(QUESTION)]), *REST], "images": []},
        ONE_IMAGE,
        1,
    ),
    "messages, marks": ({"messages": [said("user", MARKED[0]), *REST], "images": ["a"]}, ONE_IMAGE, 1),
    "messages, system": (
        {"messages": [said("system", SYSTEM), said("user", QUESTION), *REST], "images": ["a"]},
        WITH_SYSTEM,
        1,
    ),
    "messages, no image": (
        {"messages": [said("user", QUESTION), said("assistant", [text(ANSWER)])], "image": None, "prompt": "p"},
        NO_IMAGE,
        0,
    ),
    "messages, two images": (
        {"messages": [said("user", "1: <image> 2: <image>"), said("assistant", ANSWER)], "images": ["a", "a"]},
        TWO_IMAGES,
        2,
    ),
    "messages, two places": (
        {
            "messages": [
                said("user", [text("1: "), {"type": "image"}, text("2: "), {"type": "image"}]),
                said("assistant", ANSWER),
            ],
            "images": ["a", "a"],
        },
        TWO_IMAGES,
        2,
    ),
    "prompt and completion, text": ({"prompt": QUESTION, "completion": ANSWER}, NO_IMAGE, 0),
    "prompt and completion, messages": (
        {"prompt": [said("user", QUESTION)], "completion": REST, "images": ["a"]},
        ONE_IMAGE,
        1,
    ),
    "prompt and completion, system": (
        {"prompt": [said("system", SYSTEM), said("user", QUESTION)], "completion": REST, "image": "a"},
        WITH_SYSTEM,
        1,
    ),
    "LLaVA": ({"conversations": turns_of(*MARKED), "image": "a"}, ONE_IMAGE, 1),
    "LLaVA, two images": (
        {"conversations": turns_of("1: <image> 2: <image>", ANSWER), "image": ["a", "a"]},
        TWO_IMAGES,
        2,
    ),
    "ShareGPT": ({"conversations": turns_of(*MARKED), "images": ["a"]}, ONE_IMAGE, 1),
    "ShareGPT, other names": (
        {"conversations": turns_of(*MARKED, names=("user", "assistant")), "images": ["a"]},
        ONE_IMAGE,
        1,
    ),
    "ShareGPT, role and content": (
        {"conversations": turns_of(*MARKED, speaker="role", value="content", names=("user", "model")), "image": "a"},
        ONE_IMAGE,
        1,
    ),
    "ShareGPT, system": (
        {"conversations": [{"from": "system", "value": SYSTEM}, *turns_of(*MARKED)], "image": "a"},
        WITH_SYSTEM,
        1,
    ),
    "the_cauldron": ({"images": ["a"], "texts": PAIRS}, ONE_IMAGE, 1),
    "the_cauldron, no image": ({"images": [], "texts": PAIRS[:1]}, NO_IMAGE, 0),
}
"""Name -> (row whose images are all "a", the messages of its record, number of images)."""


def with_images(value: Any, image: Any) -> Any:
    """A row with `image` in the place of each "a"."""
    if isinstance(value, dict):
        return {key: with_images(item, image) for key, item in value.items()}
    if isinstance(value, list):
        return [with_images(item, image) for item in value]
    return image if value == "a" else value


def write_sources(folder: Path, num_rows: int = 4) -> None:
    """Write rows of three formats to a folder: chat.json with images/, cauldron/ with bytes in parquet, saved/."""
    (folder / "images").mkdir(parents=True)
    (folder / "images/a.png").write_bytes(picture("green"))
    chats = [
        {"id": f"chat {number}", "conversations": turns_of(*MARKED), "image": "a.png"} for number in range(num_rows)
    ]
    (folder / "chat.json").write_text(json.dumps(chats))
    shades = [f"#{16 * number:02x}0000" for number in range(num_rows)]
    cauldron = [{"images": [{"bytes": picture(shade), "path": None}] * 2, "texts": PAIRS} for shade in shades]
    (folder / "cauldron").mkdir()
    for part, rows in enumerate((cauldron[: num_rows // 2], cauldron[num_rows // 2 :])):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"cauldron/train-{part:05d}.parquet")
    said_so = [said("assistant", ANSWER)]
    messages = [
        {"messages": [said("user", IMAGE_FIRST), *said_so], "images": [Image.new("RGB", (20, 30), shade)]}
        if number % 2
        else {"messages": [said("user", QUESTION), *said_so], "images": []}
        for number, shade in enumerate(shades)
    ]
    dataset = Dataset.from_list(messages, on_mixed_types="use_json")
    DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(folder / "saved")
