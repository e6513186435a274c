"""Chat messages, as people write them, to the turns and the images of a record.

Content is a string or a list of items: {type: text, text or content} and {type: image}, which is a place that the
row's images fill in their order, or {type: image, image or path or url}, which brings its own. Without places, an
`<image>` mark in a user's text is one, as in LLaVA; without marks, all images stand before the first user turn, as TRL
does. Keys that hold None are none: `datasets` adds them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dualspeed.data.conversations import IMAGE_MARK, check_unicode, split_at_marks, text_item
from dualspeed.data.media import ImageSource, check_others, is_empty, read_source
from dualspeed.errors import RecordError
from dualspeed.settings.reading import quote

ROLES = ("system", "user", "assistant")
SOURCE_KEYS = ("image", "path", "url")
TEXT_KEYS = ("text", "content")
TOOL_KEYS = ("tool_calls", "function_call", "tool_call_id", "audio")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
MEDIA_ITEMS = ("video", "video_url", "audio", "audio_url", "input_audio")
ITEMS = "{type: text, text} and {type: image}"


@dataclass
class Turn:
    """One turn, its images not yet counted."""

    role: str
    items: list[dict[str, Any]]
    """Content items of the record."""
    sources: list[ImageSource | None] = field(default_factory=list)
    """For each image item its own image, or None for one of the row's."""
    indexes: list[Any] = field(default_factory=list)
    """For each image item the number of the row's image that it names, or None."""

    @property
    def texts(self) -> list[str]:
        """Texts of the items."""
        return [item["text"] for item in self.items if item["type"] == "text"]

    @property
    def num_marks(self) -> int:
        """Marks in the texts."""
        return sum(text.count(IMAGE_MARK) for text in self.texts)


def read_messages(
    messages: Any, images: list[ImageSource], folder: Path | None, needs_marks: bool = False
) -> dict[str, Any]:
    """Return {messages, images} of a conversation; RecordError says why it is unusable.

    Args:
        images: the row's, which fill the places.
        folder: folder that paths in the items start from.
        needs_marks: True where images without a mark or a place are an error.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise RecordError("no messages", f"{quote(messages)}; valid: a list of {{role, content}}")
    turns = [read_turn(message, number, folder) for number, message in enumerate(messages, start=1)]
    check_order([turn.role for turn in turns])
    images = place_images(turns, images, needs_marks)
    for number, turn in enumerate(turns, start=1):
        turn.items = [item for item in turn.items if item["text"] != ""] or turn.items or [text_item("")]
        if turn.role != "system" and not turn.sources and not "".join(turn.texts).strip():
            raise RecordError("empty answer" if turn.role == "assistant" else "empty question", f"turn {number}")
    return {"messages": [{"role": turn.role, "content": turn.items} for turn in turns], "images": images}


def read_turn(message: Any, number: int, folder: Path | None) -> Turn:
    """Return turn `number` of a conversation."""
    place = f"turn {number}"
    role = read_role(message, place)
    check_others(message, ("role", "content"), 0, f"{place}, key")
    turn, content = Turn(role, []), message.get("content")
    if isinstance(content, str):
        turn.items.append(text_item(content))
    elif isinstance(content, list | tuple):
        for item in content:
            add_item(turn, item, place, folder)
    else:
        raise RecordError("text is not a string", f"{place}: {quote(content)}; valid: text, or a list of {ITEMS}")
    check_unicode(*turn.texts)
    if role != "user" and (turn.sources or turn.num_marks):
        seen = "an image" if turn.sources else f"{IMAGE_MARK} mark"
        raise RecordError(f"{seen} in {'an answer' if role == 'assistant' else 'a system turn'}", place)
    return turn


def read_role(message: Any, place: str) -> str:
    """Return the role of a message; RecordError for none, and for what a role's turn would lose."""
    if not isinstance(message, Mapping):
        raise RecordError("turn is not a message", f"{place}: {quote(message)}; valid: {{role, content}}")
    if "role" not in message:
        raise RecordError("turn without `role`", f"{place} has keys {quote([*message])}; valid: role and content")
    role = message["role"]
    if not isinstance(role, str):
        raise RecordError("unknown role", f"{place} is of {quote(role)}; valid: {', '.join(ROLES)}")
    if any(not is_empty(message.get(key)) for key in TOOL_KEYS) or role in ("tool", "function"):
        raise RecordError("tool calls or audio", f"{place}; valid: turns of text and images")
    if any(not is_empty(message.get(key)) for key in REASONING_KEYS):
        raise RecordError("reasoning beside an answer", f"{place}; valid: all that is to be learned in `content`")
    if role not in ROLES:
        raise RecordError("unknown role", f"{place} is of {quote(role)}; valid: {', '.join(ROLES)}")
    return role


def add_item(turn: Turn, item: Any, place: str, folder: Path | None) -> None:
    """Append an item of a message's content to its turn."""
    kind = item.get("type") if isinstance(item, Mapping) else None
    if not isinstance(item, Mapping) or not isinstance(kind, str):
        raise RecordError("content item without type", f"{place}: {quote(item)}; valid: {ITEMS}")
    if kind in MEDIA_ITEMS:
        raise RecordError("video or audio", f"{place}: item {kind}; valid: {ITEMS}")
    if kind not in ("text", "image"):
        valid = "{type: image, image: path}, a downloaded file" if kind in ("image_url", "input_image") else ITEMS
        raise RecordError("unknown content item", f"{place}: type {quote(kind)}; valid: {valid}")
    texts = [item[key] for key in TEXT_KEYS if not is_empty(item.get(key))]
    if kind == "text":
        given = [item[key] for key in TEXT_KEYS if item.get(key) is not None]
        if not given or not all(isinstance(text, str) for text in given):
            raise RecordError("text is not a string", f"{place}: {quote(given[0] if given else None)}")
        if len(texts) > 1:
            raise RecordError("two texts in one item", f"{place}: {quote(texts)}; valid: text or content")
        check_others(item, ("type", *TEXT_KEYS), 0, f"{place}, a text's key")
        turn.items.append(text_item(texts[0] if texts else ""))
        return
    given = [key for key in SOURCE_KEYS if not is_empty(item.get(key))]
    if texts or len(given) > 1 or not is_empty(item.get("base64")):
        seen = ", ".join(quote(key) for key, value in item.items() if not is_empty(value))
        raise RecordError(
            "image item with more than an image", f"{place}: keys {seen}; valid: {', '.join(SOURCE_KEYS)}"
        )
    check_others(item, ("type", *SOURCE_KEYS), 0, f"{place}, an image's key")
    turn.indexes.append(item.get("index"))
    turn.items.append({"type": "image", "text": None})
    turn.sources.append(read_source(item[given[0]], folder) if given else None)


def check_order(roles: list[str]) -> None:
    """Raise RecordError unless the turns are one of the system or none, then pairs of user and assistant."""
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if "system" in turns:
        raise RecordError("system turn after the first turn", f"turn {roles.index('system', 1) + 1}; valid: one, first")
    for number, role in enumerate(turns):
        if role != (wanted := ("user", "assistant")[number % 2]):
            place = f"turn {number + 1 + len(roles) - len(turns)}"
            raise RecordError("turns do not alternate", f"{place} is of {role!r}; valid: {wanted!r}")
    if len(turns) % 2 or not turns:
        raise RecordError("no answer at the end", f"{len(roles)} turns; valid: pairs of user and assistant")


def place_images(turns: list[Turn], images: list[ImageSource], needs_marks: bool) -> list[ImageSource]:
    """Give every image its place in the turns; returns them in the order of their places."""
    own = [source for turn in turns for source in turn.sources]
    num_marks, num_images = sum(turn.num_marks for turn in turns), len(images)
    if own and num_marks:
        seen = f"{len(own)} image items and {num_marks} x {IMAGE_MARK}; valid: one of both"
        raise RecordError("images placed in two ways", seen)
    if any(source is not None for source in own):
        if images or None in own:
            raise RecordError(
                "images given in two ways",
                f"{len(own) - own.count(None)} of {len(own)} image items have their own, the row has {num_images}; "
                f"valid: all in the items, or all in the row",
            )
        return [source for source in own if source is not None]
    if own:
        if len(own) != num_images:
            seen = f"{len(own)} image items, {num_images} images; valid: an item for each"
            raise RecordError("number of image items is not the number of images", seen)
        indexes = [index for turn in turns for index in turn.indexes]
        if any(index is not None for index in indexes) and quote(indexes) != quote([*range(num_images)]):
            raise RecordError("images in another order", f"index {quote(indexes)}; valid: from 0, in their order")
        return images
    if num_marks or (needs_marks and images):
        if num_marks != num_images:
            raise RecordError(
                "number of <image> marks is not the number of images",
                f"{num_marks} x <image>, {num_images} images; valid: <image>, just so, once for each image",
            )
        for turn in turns:
            if turn.num_marks:
                turn.items = [part for item in turn.items for part in split_at_marks(item["text"])]
                turn.sources = [None] * sum(item["type"] == "image" for item in turn.items)
        return images
    first = next(turn for turn in turns if turn.role == "user")
    first.items = [{"type": "image", "text": None} for _ in images] + first.items
    first.sources = [None for _ in images]
    return images
