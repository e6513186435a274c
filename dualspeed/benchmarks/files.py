"""Reading official benchmark files: whatever is wrong becomes one error that names file, line and field."""

import json
from pathlib import Path
from typing import Any

from dualspeed.errors import BenchmarkError


def find_path(folder: Path, *names: str) -> Path:
    """First of `folder`/`names` that exists.

    A benchmark lists more than one name where its own release and LLaVA's evaluation folder differ.

    Raises: BenchmarkError with every name that was tried.
    """
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise BenchmarkError(f"{folder}: there is no {' or '.join(names)}")


def read_text(path: Path) -> str:
    """Content of a UTF-8 file that is there, readable and not empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BenchmarkError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BenchmarkError(f"{path}: not UTF-8 text: {error}") from error
    if not text.strip():
        raise BenchmarkError(f"{path}: the file is empty")
    return text


def read_json(path: Path, expected: type) -> Any:
    """The JSON value of a file, which must be of type `expected` (dict or list)."""
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise BenchmarkError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}); is it truncated?") from error
    if not isinstance(value, expected):
        raise BenchmarkError(f"{path}: holds a JSON {type(value).__name__}, expected a {expected.__name__}")
    return value


def read_json_lines(path: Path) -> list[tuple[str, dict]]:
    """Objects of a JSON lines file, each with its place ("file, line 3") for errors; blank lines are skipped."""
    records = []
    # Not str.splitlines, which also splits at the Unicode line separators that JSON strings may hold.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise BenchmarkError(f"{place}: not valid JSON ({error.msg}); is it truncated?") from error
        if not isinstance(record, dict):
            raise BenchmarkError(f"{place}: expected a JSON object, found {line.strip()[:40]!r}")
        records.append((place, record))
    return records


def get_field(record: dict, name: str, expected: type | tuple[type, ...], place: str) -> Any:
    """`record[name]`, which must be of type `expected`; `place` is where the record stands."""
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
    """`record[name]`, which must be one of `valid`."""
    value = get_field(record, name, str, place)
    if value not in valid:
        raise BenchmarkError(f"{place}: field {name!r} is {value!r}; valid: {', '.join(valid)}")
    return value
