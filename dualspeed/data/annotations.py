"""Files of annotations, entry by entry: whatever their size, only a few entries are in memory.

Enters: a JSON list, JSON lines, a parquet file, or a folder of parquet files (as LLaVA-NeXT-Data is published: the
images lie in the rows). Leaves: one `Entry` after another.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from dualspeed.errors import AnnotationsError

# Imported where it is used: a library user's JSON needs no pyarrow, which comes with the workflow.
if TYPE_CHECKING:
    import pyarrow.parquet

PIECE = 1 << 20
"""Characters read at once."""
LONGEST_ENTRY = 1 << 26
"""Characters after which what is still no whole entry counts as broken JSON."""
NOT_BLANK = re.compile(r"[^ \t\n\r]")
PARQUET_COLUMNS = ("id", "image", "conversations")
PARQUET_ROWS = 32
"""Rows with their images that are in memory at once."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of the annotations, not looked at yet."""

    file: Path
    number: int
    """From 1; of JSON lines, the line."""
    value: Any
    """What the JSON says; of a line that is none, the `json.JSONDecodeError`."""
    image: bytes | None = None
    """The image that lies in a parquet row, as a file's content; `value["image"]` says what to call it."""

    @property
    def place(self) -> str:
        """How messages name it."""
        return f"{self.file}:{self.number}"


def read_entries(path: Path) -> Iterator[Entry]:
    """Every entry at `path`; AnnotationsError for what cannot be read."""
    if is_parquet(path):
        for part in parquet_files(path):
            yield from read_parquet(part)
        return
    try:
        with open(path, encoding="utf-8-sig") as file:
            while (piece := file.read(PIECE)) and not piece.strip():
                pass
            is_list = piece.lstrip().startswith("[")
            file.seek(0)
            yield from read_list(path, file) if is_list else read_lines(path, file)
    except FileNotFoundError:
        raise AnnotationsError(f"{path}: does not exist; valid: a file of LLaVA conversations") from None
    except (OSError, UnicodeDecodeError) as error:
        raise AnnotationsError(f"{path}: cannot be read as UTF-8 text: {error}") from error


def count_entries(path: Path) -> int:
    """Number of entries at `path`, which is thereby known to be readable to its end."""
    if is_parquet(path):
        return sum(open_parquet(file).metadata.num_rows for file in parquet_files(path))
    return sum(1 for entry in read_entries(path))


def read_lines(path: Path, file: IO[str]) -> Iterator[Entry]:
    """Entries of JSON lines."""
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                value = error
            yield Entry(path, number, value)


def read_list(path: Path, file: IO[str]) -> Iterator[Entry]:
    """Entries of a JSON list, of which no more than a few pieces are in memory."""
    decoder = json.JSONDecoder()
    text, lines_before, number = "", 0, 0
    position = 0  # where in `text` the next entry is looked for
    while True:
        try:
            mark, start = _next_mark(text, position, "[" if number == 0 else ",]")
            if mark == "]" or (mark == "[" and text.startswith("]", start)):
                break
            value, end = decoder.raw_decode(text, start)
            if end == len(text):
                raise json.JSONDecodeError("Entry without an end", text, end)  # a number may go on
        except json.JSONDecodeError as error:
            more = "" if len(text) - position > LONGEST_ENTRY else file.read(max(PIECE, len(text) - position))
            if not more:
                line = lines_before + text.count("\n", 0, error.pos) + 1
                raise AnnotationsError(f"{path}: line {line} is not valid JSON: {error.msg}") from error
            lines_before += text.count("\n", 0, position)
            text, position = text[position:] + more, 0
            continue
        number, position = number + 1, end
        yield Entry(path, number, value)


def _next_mark(text: str, position: int, marks: str) -> tuple[str, int]:
    """The mark (one of `marks`) that stands after blanks, and where what comes after it starts."""
    position = _skip_blanks(text, position)
    if position == len(text) or text[position] not in marks:
        raise json.JSONDecodeError(f"Expecting one of {marks!r}", text, position)
    return text[position], _skip_blanks(text, position + 1)


def _skip_blanks(text: str, position: int) -> int:
    found = NOT_BLANK.search(text, position)
    return found.start() if found else len(text)


# Parquet


def is_parquet(path: Path) -> bool:
    """Whether `path` is a parquet file or a folder, which can only be one of parquet files."""
    return path.is_dir() or path.suffix == ".parquet"


def parquet_files(path: Path) -> list[Path]:
    """The parquet files at `path`, in the order of their names."""
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise AnnotationsError(f"{path}: no parquet file in this folder; valid: LLaVA conversations as JSON or parquet")
    return files


def open_parquet(file: Path) -> "pyarrow.parquet.ParquetFile":
    """The parquet file with its columns checked."""
    import pyarrow.parquet

    try:
        opened = pyarrow.parquet.ParquetFile(file)
    except FileNotFoundError:
        raise AnnotationsError(f"{file}: does not exist; valid: a file of LLaVA conversations") from None
    except (OSError, pyarrow.ArrowException) as error:
        raise AnnotationsError(f"{file}: cannot be read as parquet: {error}") from error
    if "conversations" not in opened.schema_arrow.names:
        names = ", ".join(opened.schema_arrow.names)
        raise AnnotationsError(f"{file}: has columns {names}; valid: {', '.join(PARQUET_COLUMNS)}")
    return opened


def read_parquet(file: Path) -> Iterator[Entry]:
    """Rows of a parquet file; an image in a row gets the name <file>/<row>.<type>."""
    import pyarrow

    opened, number = open_parquet(file), 0
    columns = [name for name in PARQUET_COLUMNS if name in opened.schema_arrow.names]
    try:
        for batch in opened.iter_batches(PARQUET_ROWS, columns=columns):
            for row in batch.to_pylist():
                number += 1
                image = row.pop("image", None)
                content = image.get("bytes") if isinstance(image, dict) else None
                if content is not None:
                    image = f"{file.stem}/{number - 1:07d}{suffix_of(content)}"
                yield Entry(file, number, row | {"image": image}, content)
    except (OSError, pyarrow.ArrowException) as error:
        raise AnnotationsError(f"{file}: is damaged after row {number}: {error}") from error


def suffix_of(content: bytes) -> str:
    """File name suffix of an image, by its first bytes."""
    signatures = {b"\xff\xd8": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif", b"RIFF": ".webp"}
    return next((suffix for start, suffix in signatures.items() if content.startswith(start)), ".img")
