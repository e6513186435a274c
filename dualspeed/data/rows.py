"""Rows of datasets, in whatever columns they come, to records {id, messages, images} with which everything else works.

A row's columns say its format: `messages`; `prompt` and `completion`; `conversations` (LLaVA, ShareGPT); `texts` (the
Cauldron). Its images are in `images` or `image`, or in the items of its messages. Nothing is repaired, guessed or
ignored: what is unusable, ambiguous, or would be lost is a `Problem`, which names what was seen and what is valid.
docs/data.md has the formats.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from dualspeed.data.conversations import Problem, check_unicode, drop_unpaired_ends, parse_entry
from dualspeed.data.media import ImageSource, check_others, described, is_empty, read_sources
from dualspeed.data.messages import read_messages
from dualspeed.errors import AnnotationsError, RecordError
from dualspeed.settings.data_source import FORMATS
from dualspeed.settings.reading import quote

Row = Mapping[Any, Any]
ToMessages = Callable[[Any], Any]
COLUMNS = dict(zip(FORMATS, (("messages",), ("prompt", "completion"), ("conversations",), ("texts",)), strict=True))
"""Format -> the columns that hold its text."""
VALID = "messages; prompt and completion; conversations; or texts; with images or image, where there are images"
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant"}
SPEAKERS |= {"system": "system"}
"""Names in `from`, or in `role` of `conversations` -> roles."""
LARGEST_ID = 2**63


def read_row(
    row: Row,
    name: str,
    images: Path | None = None,
    to_messages: ToMessages | None = None,
    row_format: str | None = None,
) -> dict[str, Any] | Problem:
    """Return the record {id, messages, images} of a row, or the problem that makes it unusable; it raises no error.

    Args:
        row: column -> value. Images are paths, bytes, {bytes, path} or PIL images, and stay so in the record.
        name: names the row in problems, and is its id unless it has one.
        images: folder that image paths start from, and that none may leave; None: paths are taken as they are.
        to_messages: function that makes another row of it, in a known format, or a list of messages, which the row's
            images then belong to unless the messages have their own.
        row_format: one of FORMATS; None: the one that its columns have.
    """
    own_id = row.get("id") if isinstance(row, Mapping) else None
    if isinstance(own_id, int) and not isinstance(own_id, bool) and abs(own_id) < LARGEST_ID:
        own_id = str(own_id)
    record_id = own_id if isinstance(own_id, str) and own_id else name
    try:
        check_unicode(record_id)
        if not isinstance(row, Mapping):
            raise RecordError("not a row", f"{described(row)}; valid: columns with values")
        if to_messages is not None:
            row, row_format = converted(row, to_messages), None
        return {"id": record_id, **parse_row(row, images, row_format)}
    except RecordError as error:
        return Problem(record_id, name, *error.args)


def check_columns(names: Iterable[str], where: str = "the dataset", row_format: str | None = None) -> None:
    """Raise AnnotationsError unless a dataset's columns are of a format.

    Args:
        where: names the dataset in the message.
        row_format: the one of FORMATS that they have to be of; None: any.
    """
    names, formats = [*names], FORMATS if row_format is None else (row_format,)
    if any(set(COLUMNS[name]) <= set(names) for name in formats):
        return
    valid = VALID if row_format is None else " and ".join(COLUMNS[row_format])
    raise AnnotationsError(f"{where}: has columns {', '.join(map(str, names))}; valid: {valid} (docs/data.md)")


def parse_row(row: Row, folder: Path | None, row_format: str | None) -> dict[str, Any]:
    """Return {messages, images} of a row; RecordError says why it is unusable."""
    row_format = row_format or recognised(row)
    columns = COLUMNS[row_format]
    if any(is_empty(row.get(column)) for column in columns):
        raise RecordError("empty row", f"{' or '.join(columns)} is empty or missing")
    if row_format == "conversations" and is_llava(row):
        record = parse_entry(dict(row), folder)
    else:
        record = READERS[row_format](row, read_sources(row, folder), folder)
    check_others(row, (*columns, "id", "images", "image"), len(record["images"]))
    return record


def recognised(row: Row) -> str:
    """Return the format that a row's filled columns have."""
    found = [name for name, columns in COLUMNS.items() if not any(is_empty(row.get(column)) for column in columns)]
    if len(found) == 1:
        return found[0]
    if found:
        seen = ", ".join(column for name in found for column in COLUMNS[name])
        raise RecordError("two formats in one row", f"columns {seen}; valid: one format, or `format` says which")
    given = [columns for columns in COLUMNS.values() if all(column in row for column in columns)]
    if known := [column for columns in given for column in columns]:
        raise RecordError("empty row", f"column {', '.join(known)}; valid: {VALID}, with something in them")
    raise RecordError("columns of no format", f"columns {quote([*row])}; valid: {VALID}")


def converted(row: Row, to_messages: ToMessages) -> Row:
    """Return the row that the caller's function makes of one."""
    try:
        made = to_messages(row)
    except Exception as error:  # of any kind: the function is the caller's
        raise RecordError("to_messages failed", f"{type(error).__name__}: {quote(str(error))}") from error
    if isinstance(made, Mapping):
        return made
    if not isinstance(made, list | tuple):
        raise RecordError("to_messages gave no messages", f"{described(made)}; valid: a list of messages, or a row")
    has_own = any(item.get(key) is not None for item in image_items(made) for key in ("image", "path", "url"))
    return {"messages": made} | ({} if has_own else {key: row[key] for key in ("images", "image") if key in row})


def image_items(messages: Iterable[Any]) -> list[Mapping[str, Any]]:
    """Return the image items in the content of messages."""
    contents = [message.get("content") for message in messages if isinstance(message, Mapping)]
    items = [item for content in contents if isinstance(content, list | tuple) for item in content]
    return [item for item in items if isinstance(item, Mapping) and is_text(item.get("type"), "image")]


def is_text(value: Any, text: str) -> bool:
    """True for just this text; other types may compare in ways of their own."""
    return isinstance(value, str) and value == text


def read_chat(row: Row, images: list[ImageSource], folder: Path | None) -> dict[str, Any]:
    """Read `messages`."""
    return read_messages(row["messages"], images, folder)


def read_prompt(row: Row, images: list[ImageSource], folder: Path | None) -> dict[str, Any]:
    """Read `prompt` and `completion`, both text or both lists of messages."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return read_messages(messages, images, folder)
    if not (isinstance(prompt, list | tuple) and isinstance(completion, list | tuple)):
        seen = f"{type(prompt).__name__} and {type(completion).__name__}"
        raise RecordError(
            "prompt and completion of other types", f"{seen}; valid: both text, or both lists of messages"
        )
    if any(is_text(message.get("role"), "assistant") for message in prompt if isinstance(message, Mapping)):
        raise RecordError("answer in a prompt", "it would be learned too; valid: one in `completion`, or `messages`")
    return read_messages([*prompt, *completion], images, folder)


def read_texts(row: Row, images: list[ImageSource], folder: Path | None) -> dict[str, Any]:
    """Read `texts`, pairs of user and assistant."""
    pairs = row["texts"]
    if not isinstance(pairs, list | tuple) or not all(
        isinstance(pair, Mapping) and {"user", "assistant"} <= pair.keys() for pair in pairs
    ):
        raise RecordError("texts are no pairs", f"{quote(pairs)}; valid: a list of {{user, assistant}}")
    for number, pair in enumerate(pairs, start=1):
        check_others(pair, ("user", "assistant"), 0, f"pair {number}, key")
        if not (isinstance(pair["user"], str) and isinstance(pair["assistant"], str)):
            raise RecordError("text is not a string", f"pair {number}: {quote(dict(pair))}")
    roles = ("user", "assistant")
    return read_messages([{"role": role, "content": pair[role]} for pair in pairs for role in roles], images, folder)


def is_llava(row: Row) -> bool:
    """True for LLaVA's own form: turns from human and gpt alone, image paths under `image`.

    Such a row is read by the rules of dualspeed.data.conversations, and has the problems that they name.
    """
    turns, image = row["conversations"], row.get("image")
    is_own = isinstance(turns, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("from"), str) and turn["from"] in ("human", "gpt")
        for turn in turns
    )
    paths = image if isinstance(image, list | tuple) else [image]
    has_paths = all(path is None or isinstance(path, str | int | float | list) for path in paths)
    return is_own and has_paths and is_empty(row.get("images"))


def read_conversations(row: Row, images: list[ImageSource], folder: Path | None) -> dict[str, Any]:
    """Read `conversations` of the kinds beside LLaVA's own: other speakers, {role, content}, images in the row."""
    turns = row["conversations"]
    if not isinstance(turns, list | tuple):
        raise RecordError("not a conversation", f"{quote(turns)}; valid: a list of turns")
    messages = [as_message(turn, number) for number, turn in enumerate(turns, start=1)]
    start = 1 if messages and messages[0]["role"] == "system" else 0
    speakers = {"user": "human", "assistant": "gpt"}
    rest = [{**message, "from": speakers.get(message["role"])} for message in messages[start:]]
    return read_messages([*messages[:start], *drop_unpaired_ends(rest)], images, folder, needs_marks=True)


def as_message(turn: Any, number: int) -> dict[str, Any]:
    """Return a turn {from, value} or {role, content} as {role, content}."""
    if not isinstance(turn, Mapping):
        raise RecordError("turn is not a message", f"turn {number}: {quote(turn)}; valid: {{from, value}}")
    for speaker, text in (("from", "value"), ("role", "content")):
        if turn.get(speaker) is not None:
            name, others = turn[speaker], {key: value for key, value in turn.items() if key not in (speaker, text)}
            if not isinstance(name, str) or name not in SPEAKERS:
                raise RecordError("unknown role", f"turn {number} is from {quote(name)}; valid: {', '.join(SPEAKERS)}")
            return {**others, "role": SPEAKERS[name], "content": turn.get(text)}
    raise RecordError("turn without `from`", f"turn {number} has keys {quote([*turn])}; valid: from and value")


READERS = {
    "messages": read_chat,
    "prompt_completion": read_prompt,
    "conversations": read_conversations,
    "texts": read_texts,
}
"""Format -> function of a row, its images and their folder."""
