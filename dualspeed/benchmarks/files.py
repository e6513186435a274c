"""Readers of official benchmark files: anything wrong becomes one error that names file, line and field."""

import json
import os
from pathlib import Path
from typing import Any

from dualspeed.errors import BenchmarkError


def find_path(folder: Path, *names: str) -> Path:
    """First of `folder`/`names` that exists.

    A benchmark lists several names where its own release and LLaVA's evaluation folder differ.

    Raises:
        BenchmarkError: none exists; the message lists all of `names`.
    """
    for name in names:
        if os.path.exists(folder / name):  # Path.exists fails at a name that is too long
            return folder / name
    raise BenchmarkError(f"{folder}: there is no {' or '.join(names)}")


def read_text(path: Path) -> str:
    """Content of a UTF-8 file, without its byte order mark. Raises BenchmarkError if it can't be read or is empty."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BenchmarkError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BenchmarkError(f"{path}: not UTF-8 text: {error}") from error
    if not text.strip():
        raise BenchmarkError(f"{path}: the file is empty")
    return text


def parse_json(text: str, place: str, names_line: bool = False) -> Any:
    """JSON value of a text; errors name its `place`, and the line in it if asked for."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if names_line else ""
        raise BenchmarkError(f"{place}{line}: not valid JSON ({error.msg}); is it truncated?") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
        raise BenchmarkError(f"{place}: not readable as JSON ({error})") from error


def read_json(path: Path, expected: type) -> Any:
    """JSON value of a file, which must be of type `expected` (dict or list)."""
    value = parse_json(read_text(path), str(path), names_line=True)
    if not isinstance(value, expected):
        raise BenchmarkError(f"{path}: holds a JSON {type(value).__name__}, expected a {expected.__name__}")
    return value


def read_json_lines(path: Path) -> list[tuple[str, dict]]:
    """(place, object) of each line of a JSON lines file; errors name the place. Blank lines are skipped."""
    lines = []
    # Not str.splitlines, which also splits at the Unicode line separators that JSON strings may hold.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        value = parse_json(line, place)
        if not isinstance(value, dict):
            raise BenchmarkError(f"{place}: expected a JSON object, found {line.strip()[:40]!r}")
        lines.append((place, value))
    return lines


def read_entries(path: Path, key: str | None = None) -> list[tuple[str, dict]]:
    """(place, object) of each entry of a JSON file: a list, or a mapping that holds the list under `key`."""
    if key is None:
        return check_entries(read_json(path, list), f"{path}, entry")
    return check_entries(get_field(read_json(path, dict), key, list, str(path)), f"{path}: field {key!r}, entry")


def check_entries(entries: list, start: str) -> list[tuple[str, dict]]:
    """(place, object) of each entry, which must be a JSON object; its place is `start` and its number."""
    places = [f"{start} {number}" for number in range(len(entries))]
    return [(place, check_object(entry, place)) for place, entry in zip(places, entries, strict=True)]


def check_object(value: Any, place: str) -> dict:
    """`value`, which must be a JSON object."""
    if not isinstance(value, dict):
        raise BenchmarkError(f"{place}: expected an object, found {value!r}")
    return value


def get_field(record: dict, name: str, expected: type | tuple[type, ...], place: str) -> Any:
    """`record[name]`, which must be of type `expected`; errors name `place`."""
    types = expected if isinstance(expected, tuple) else (expected,)
    names = " or ".join(each.__name__ for each in types)
    if name not in record:
        raise BenchmarkError(f"{place}: field {name!r} is missing; expected {names}")
    value = record[name]
    # bool is a subclass of int, but no official field takes True for a number.
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise BenchmarkError(f"{place}: field {name!r} is {value!r}, expected {names}")
    return value


def get_choice(record: dict, name: str, valid: tuple[str, ...], place: str) -> str:
    """`record[name]`, which must be one of `valid`; errors name `place`."""
    value = get_field(record, name, str, place)
    if value not in valid:
        raise BenchmarkError(f"{place}: field {name!r} is {value!r}; valid: {', '.join(valid)}")
    return value
