"""Conversion of LLaVA's conversations to records with messages in Hugging Face's chat format.

Input: entries {id, image, conversations: [{from: human | gpt, value}]}; `image` is a path, a list of paths or absent,
and `<image>` in the human's turns marks the position of an image. Output: for each entry a record {id, messages,
images}, or a `Problem` if the entry is unusable. Nothing is repaired silently, and no entry raises an error.

The rule for paths: an image path is relative to the folder of images, has / between its parts, no `..` among them and
no blank at its ends, and is taken letter by letter. Anything else is a problem.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dualspeed.data.annotations import MISNAMED_IMAGES, UNREAD_MEDIA, Entry
from dualspeed.errors import RecordError

IMAGE_MARK = "<image>"
MARK_LIKE = re.compile(r"<[^<>\w]{0,4}im(?:age|g)[^<>\n]{0,24}>", re.IGNORECASE)
"""Marks that other formats have for IMAGE_MARK, such as <IMAGE> and <image 1>."""
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
BASE64 = re.compile(r"[A-Za-z0-9+/\s]{200,}={0,2}\s*")
"""Text that is longer than any sensible path, without the dot of a suffix."""
ROLES = {"human": "user", "gpt": "assistant"}
SHOWN = 80
"""Characters of a bad value that a problem shows."""


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


def parse_entry(entry: Any, images: Path | None) -> dict[str, Any]:
    """Return {messages, images} of one entry; RecordError says why it is unusable.

    Args:
        images: folder that its image paths start from; None: they are taken as they are.
    """
    if isinstance(entry, json.JSONDecodeError):
        raise RecordError("malformed JSON line", str(entry))
    if not isinstance(entry, dict) or not isinstance(entry.get("conversations"), list):
        seen = f"keys {', '.join(map(str, entry))}" if isinstance(entry, dict) else type(entry).__name__
        raise RecordError("not a conversation", f"{shortened(seen)}; valid: an object with a list `conversations`")
    check_keys(entry)
    paths = parse_images(entry.get("image"), images)
    turns = drop_unpaired_ends(entry["conversations"])
    if not turns or len(turns) % 2:
        raise RecordError("turns do not alternate", f"{len(turns)} turns; valid: pairs of human and gpt")
    messages = [parse_turn(turn, number) for number, turn in enumerate(turns)]
    num_marks = sum(item["type"] == "image" for message in messages for item in message["content"])
    if num_marks != len(paths):
        others = {mark for turn in turns for mark in MARK_LIKE.findall(turn["value"]) if mark != IMAGE_MARK}
        seen = f" and {', '.join(sorted(others)[:3])}" if others else ""
        raise RecordError(
            "number of <image> marks is not the number of images",
            f"{num_marks} x <image>{seen}, {len(paths)} images; valid: <image>, just so, once for each image",
        )
    return {"messages": messages, "images": paths}


def check_keys(entry: dict[str, Any]) -> None:
    """Raise RecordError for pictures under another key than `image`, and for what no model here can read."""
    for key, value in entry.items():
        name = str(key).strip().casefold()
        if value is None or (isinstance(value, str | list | dict) and not value):
            continue
        if name in UNREAD_MEDIA:
            raise RecordError("video or audio", f"key {key!r}; valid: images alone, under `image`")
        if (name in MISNAMED_IMAGES or (name == "image" and key != "image")) and not entry.get("image"):
            raise RecordError("images under another key", f"key {key!r}; valid: `image`, a path or a list of paths")


def drop_unpaired_ends(turns: list[Any]) -> list[Any]:
    """Return the turns from the first question to the last answer.

    ShareGPT's conversations may begin with an answer, which LLaVA drops too, or end with a question, which has no
    supervised answer.
    """
    speakers = [turn.get("from") if isinstance(turn, dict) else None for turn in turns]
    start = 1 if speakers[:2] == ["gpt", "human"] else 0
    end = len(turns) - 1 if speakers[-2:] == ["gpt", "human"] else len(turns)
    return turns[start:end]


def parse_images(image: Any, folder: Path | None) -> list[str]:
    """Return the entry's image paths, which include the folder: none, one or several."""
    paths = [] if image is None else [image] if isinstance(image, str) else image
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        valid = "valid: a path, a list of paths, or no such key; in parquet {bytes, path} with the file's bytes"
        raise RecordError("image is not a path", f"{shortened(shown(image))}; {valid}")
    check_unicode(*paths)
    return [located(path, folder) for path in paths]


def located(path: str, folder: Path | None) -> str:
    """Return an image path with the folder that it starts from; RecordError if it is no path, or leads out of it."""
    check_unicode(path)
    check_path(path, is_inside=folder is not None)
    return path if folder is None else str(folder / path)


def check_path(path: str, is_inside: bool = True) -> None:
    """Raise RecordError for what is no path by the rule of this module.

    Args:
        is_inside: True for a path inside the folder of images; False for one that any program may open.
    """
    reason = None
    if path[:5].casefold() == "data:":
        reason, valid = "image is a data: URL", "a file, with its path in its place"
    elif ADDRESS.match(path):
        reason, valid = "image is an address", "a file that was downloaded, with its path in its place"
    elif BASE64.fullmatch(path):
        reason, valid = "image is base64 text", "a file, with its path in its place"
    elif not is_inside:
        return
    elif path != path.strip():
        reason, valid = "image path with blanks at its ends", "the path without them"
    elif "\\" in path:
        reason, valid = "image path with backslashes", "/ between its parts"
    elif path.startswith("/") or re.match(r"[A-Za-z]:", path):
        reason, valid = "image path is absolute", "a path relative to `images`"
    elif ".." in path.split("/"):
        reason, valid = "image path with ..", "a path inside the folder `images`"
    if reason is not None:
        raise RecordError(reason, f"{shortened(repr(path))}; valid: {valid}")


def shown(value: Any) -> str:
    """Return the Python text of a value; of an int with more digits than Python converts its type."""
    try:
        return repr(value)
    except ValueError:
        return f"<{type(value).__name__}>"


def shortened(text: str) -> str:
    """Return the start of a long text."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text)} characters)"


def parse_turn(turn: Any, number: int) -> dict[str, Any]:
    """Return the message of turn `number`: even turns are the human's, odd ones the model's."""
    speaker = list(ROLES)[number % 2]
    if isinstance(turn, dict) and "from" not in turn:
        seen = shortened(", ".join(map(str, turn)))
        raise RecordError("turn without `from`", f"turn {number + 1} has keys {seen}; valid: from and value")
    if not isinstance(turn, dict) or turn.get("from") != speaker:
        found = turn.get("from") if isinstance(turn, dict) else turn
        raise RecordError(
            "turns do not alternate", f"turn {number + 1} is from {shortened(shown(found))}; valid: {speaker!r}"
        )
    text = turn.get("value")
    if not isinstance(text, str):
        raise RecordError("text is not a string", f"turn {number + 1}: {shortened(shown(text))}")
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
    if IMAGE_MARK in "".join(pieces):
        raise RecordError("<image> mark inside another", f"{shortened(repr(text))}; valid: <image>, just so")
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
            raise RecordError("text is not valid Unicode", f"{shortened(repr(text))}: {error.reason}") from None


def text_item(text: str) -> dict[str, Any]:
    """Return a content item of plain text."""
    return {"type": "text", "text": text}
