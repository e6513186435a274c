"""Conversion of LLaVA's conversations to records with messages in Hugging Face's chat format.

Input: entries {id, image, conversations: [{from: human | gpt, value}]}; `image` is a path, a list of paths or absent,
and `<image>` in the human's turns marks the position of an image. Output: for each entry a record {id, messages,
images}, or a `Problem` if the entry is unusable. Nothing is repaired silently, and no entry raises an error.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dualspeed.data.annotations import Entry
from dualspeed.errors import RecordError

IMAGE_MARK = "<image>"
ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Problem:
    """Reason why an entry of the annotations, or one of its images, was dropped."""

    id: str
    file: str
    reason: str
    detail: str = ""

    def to_dict(self) -> dict[str, str]:
        """Return the four fields, as the manifest lists them."""
        return asdict(self)


def read_record(entry: Entry, images: Path) -> dict[str, Any] | Problem:
    """Return the record {id, messages, images} of an entry, or the problem that makes it unusable.

    Args:
        entry: one entry of the annotations (`read_entries`).
        images: folder that the entry's image paths start from; the record's paths include it.

    An entry without an id gets "<file name>:<number of the entry>".
    """
    name = f"{entry.file.name}:{entry.number}"
    if isinstance(entry.value, dict) and entry.value.get("id") not in (None, ""):
        name = str(entry.value["id"])
    try:
        check_unicode(name)
        return {"id": name, **parse_entry(entry.value, images)}
    except RecordError as error:
        return Problem(name, entry.place, *error.args)


def parse_entry(entry: Any, images: Path) -> dict[str, Any]:
    """Return {messages, images} of one entry; RecordError says why it is unusable."""
    if isinstance(entry, json.JSONDecodeError):
        raise RecordError("malformed JSON line", str(entry))
    if not isinstance(entry, dict) or not isinstance(entry.get("conversations"), list):
        raise RecordError("not a conversation", "valid: an object with a list `conversations`")
    paths = parse_images(entry.get("image"))
    turns = drop_unpaired_ends(entry["conversations"])
    if not turns or len(turns) % 2:
        raise RecordError("turns do not alternate", f"{len(turns)} turns; valid: pairs of human and gpt")
    messages = [parse_turn(turn, number) for number, turn in enumerate(turns)]
    num_marks = sum(item["type"] == "image" for message in messages for item in message["content"])
    if num_marks != len(paths):
        raise RecordError("number of <image> marks is not the number of images", f"{num_marks} marks, {len(paths)}")
    return {"messages": messages, "images": [str(images / path) for path in paths]}


def drop_unpaired_ends(turns: list[Any]) -> list[Any]:
    """Return the turns from the first question to the last answer.

    ShareGPT's conversations may begin with an answer, which LLaVA drops too, or end with a question, which has no
    supervised answer.
    """
    speakers = [turn.get("from") if isinstance(turn, dict) else None for turn in turns]
    start = 1 if speakers[:2] == ["gpt", "human"] else 0
    end = len(turns) - 1 if speakers[-2:] == ["gpt", "human"] else len(turns)
    return turns[start:end]


def parse_images(image: Any) -> list[str]:
    """Return the entry's image paths: none, one or several."""
    paths = [] if image is None else [image] if isinstance(image, str) else image
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise RecordError("image is not a path", f"{image!r}; valid: a path, a list of paths, or no such key")
    check_unicode(*paths)
    return paths


def parse_turn(turn: Any, number: int) -> dict[str, Any]:
    """Return the message of turn `number`: even turns are the human's, odd ones the model's."""
    speaker = list(ROLES)[number % 2]
    if not isinstance(turn, dict) or turn.get("from") != speaker:
        found = turn.get("from") if isinstance(turn, dict) else turn
        raise RecordError("turns do not alternate", f"turn {number + 1} is from {found!r}; valid: {speaker!r}")
    text = turn.get("value")
    if not isinstance(text, str):
        raise RecordError("text is not a string", f"turn {number + 1}: {text!r}")
    check_unicode(text)
    if not text.strip():
        raise RecordError("empty question" if speaker == "human" else "empty answer", f"turn {number + 1}")
    if speaker == "gpt":
        if IMAGE_MARK in text:
            raise RecordError("<image> mark in an answer", f"turn {number + 1}")
        return {"role": ROLES[speaker], "content": [text_item(text)]}
    return {"role": ROLES[speaker], "content": split_at_marks(text)}


def split_at_marks(text: str) -> list[dict[str, Any]]:
    """Return the content items of a human turn.

    As in LLaVA, a single image moves to the start of its turn, and the text is stripped. Several images stay in their
    places, since the text refers to them by position: "1: <image> 2: <image>".
    """
    pieces = text.split(IMAGE_MARK)
    if len(pieces) == 1:
        return [text_item(text)]
    if len(pieces) == 2:
        pieces = ["", "".join(pieces)]
    # The chat template puts a line break after each image, so blanks after a mark are removed.
    pieces = [pieces[0].lstrip(), *(piece.lstrip() for piece in pieces[1:])]
    pieces[-1] = pieces[-1].rstrip()
    items = []
    for number, piece in enumerate(pieces):
        if number > 0:
            items.append({"type": "image", "text": None})
        if piece:
            items.append(text_item(piece))
    return items


def check_unicode(*texts: str) -> None:
    """Raise RecordError for half of a surrogate pair: JSON can hold one, but tokenizers and Arrow reject it."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RecordError("text is not valid Unicode", f"{text!r}: {error.reason}") from None


def text_item(text: str) -> dict[str, Any]:
    """Return a content item of plain text."""
    return {"type": "text", "text": text}
