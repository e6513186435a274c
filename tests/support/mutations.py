"""Random mutations of valid input, as strategies of Hypothesis: of a file's bytes, of text, and of a JSON value's tree.

What happens to files in the hands of people and programs: cut, doubled, swapped, written over, re-encoded; and to
values: another type, lost, doubled, moved.
"""

import copy
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

ENCODINGS = ("utf-8-sig", "utf-16", "latin-1", "cp1252", "utf-16-le")
VALUES = (
    *(None, True, False, 0, -1, 1.5, 1e308, float("nan"), 10**30),
    *("", " ", "0", "a", "null", "<image>", "é", "\ud800", "\x00", "\ufeff", "../x", "a" * 300),
    *([], [[]], {}, {"a": None}, [1, "a", None]),
)
"""Values that another program may have written in a value's place."""
CHARACTERS = (*"\t\n \"',;:{}[]#\\\x00\ufeffé0", "\r\n")
"""Characters that break a line, a cell or a value."""
positions = st.floats(0, 1, exclude_max=True)


@st.composite
def mutated_bytes(draw: st.DrawFn, samples: Sequence[bytes], most: int = 3) -> bytes:
    """One of `samples` after up to `most` mutations of its bytes."""
    content = draw(st.sampled_from(samples))
    for _ in range(draw(st.integers(0, most))):
        content = _mutate(draw, content)
    return content


def mutated_text(samples: Sequence[str], most: int = 3) -> st.SearchStrategy[bytes]:
    """Bytes of one of `samples` with characters put in, taken out or moved, in UTF-8 or re-encoded."""
    return _mutated_text(tuple(samples), most) | mutated_bytes([sample.encode() for sample in samples], most)


@st.composite
def _mutated_text(draw: st.DrawFn, samples: Sequence[str], most: int) -> bytes:
    text = draw(st.sampled_from(samples))
    for _ in range(draw(st.integers(0, most))):
        start, end = _span(draw, len(text))
        piece = draw(st.sampled_from(CHARACTERS))
        kind = draw(st.sampled_from(("insert", "replace", "delete", "double", "line")))
        if kind == "insert":
            text = text[:start] + piece + text[start:]
        elif kind == "replace":
            text = text[:start] + piece + text[end:]
        elif kind == "delete":
            text = text[:start] + text[end:]
        elif kind == "double":
            text = text[:end] + text[start:]
        else:
            lines = text.splitlines(keepends=True) or [""]
            number = int(draw(positions) * len(lines))
            text = "".join([*lines[:number], *lines[number + 1 :], lines[number]])
    encoding = draw(st.sampled_from(("utf-8", "utf-8", "utf-8", *ENCODINGS)))
    return text.encode(encoding, errors="replace")


def _mutate(draw: st.DrawFn, content: bytes) -> bytes:
    start, end = _span(draw, len(content))
    kind = draw(st.sampled_from(("cut", "delete", "double", "swap", "flip", "write over", "insert", "zeros")))
    if kind == "cut":
        return content[:start]
    if kind == "delete":
        return content[:start] + content[end:]
    if kind == "double":
        return content[:end] + content[start:]
    if kind == "swap":
        middle = (start + end) // 2
        return content[:start] + content[middle:end] + content[start:middle] + content[end:]
    if kind == "flip":
        flipped = bytes([content[start] ^ (1 << draw(st.integers(0, 7)))]) if start < len(content) else b""
        return content[:start] + flipped + content[start + 1 :]
    if kind == "zeros":
        return content[:start] + bytes(end - start) + content[end:]
    piece = draw(st.binary(min_size=1, max_size=8))
    return content[:start] + piece + content[start + (len(piece) if kind == "write over" else 0) :]


def _span(draw: st.DrawFn, length: int) -> tuple[int, int]:
    """Start and end of a piece, short ones as likely as long ones."""
    start = int(draw(positions) * (length + 1))
    longest = draw(st.sampled_from((1, 8, length)))
    return start, min(length, start + int(draw(positions) * longest) + 1)


@st.composite
def mutated_values(draw: st.DrawFn, samples: Sequence[Any], most: int = 3) -> Any:
    """One of `samples` (JSON values) after up to `most` mutations of its tree."""
    root = [copy.deepcopy(draw(st.sampled_from(samples)))]
    for _ in range(draw(st.integers(0, most))):
        places = _places(root)
        holder, key = places[int(draw(positions) * len(places))]
        kind = draw(st.sampled_from(("retype", "retype", "lose", "double", "move", "rename")))
        if kind == "retype" or holder is root:
            holder[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
        elif kind == "lose":
            del holder[key]
        elif kind == "move":
            other_holder, other_key = places[int(draw(positions) * len(places))]
            holder[key] = copy.deepcopy(other_holder[other_key])
        elif isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        else:
            name = draw(st.sampled_from((f"{key} ", str(key).upper(), f"{key}s", "")))
            holder[name] = holder.pop(key) if kind == "rename" else copy.deepcopy(holder[key])
    return root[0]


def _places(root: list[Any]) -> list[tuple[Any, Any]]:
    """Each (holder, key or index) below `root`."""
    places: list[tuple[Any, Any]] = []
    waiting: list[Any] = [root]
    while waiting:
        holder = waiting.pop()
        keys = range(len(holder)) if isinstance(holder, list) else list(holder)
        for key in keys:
            places.append((holder, key))
            if isinstance(holder[key], list | dict):
                waiting.append(holder[key])
    return places
