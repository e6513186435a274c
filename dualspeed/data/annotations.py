"""Streaming reader of annotation files, whose memory doesn't grow with the file.

Input: a JSON list, JSON lines, a parquet file, or a folder of parquet files (as LLaVA-NeXT-Data is published, with the
images in the rows). Output: one `Entry` after another.

JSON lists are parsed here and not by ijson, which is slower, names no line in its errors, and reads half a surrogate
pair as "?" (measurements/annotations.py).
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from dualspeed.data.arrow_rows import rows_of
from dualspeed.errors import AnnotationsError

# Imported inside the functions that use it: pyarrow comes with the workflow, and JSON files don't need it.
if TYPE_CHECKING:
    import pyarrow.parquet

BLOCK_SIZE = 1 << 20
"""Characters read at once."""
MAX_ENTRY_LENGTH = 1 << 26
"""Longest entry in characters; a longer text without a complete entry is an error."""
NOT_BLANK = re.compile(r"[^ \t\n\r]")
PARQUET_COLUMNS = ("id", "image", "conversations")
MISNAMED_IMAGES = ("images", "img", "imgs", "image_path", "image_paths", "image_file", "picture", "pictures")
"""Names that other formats have for `image`, in lower case; an entry with one of them in its place is unusable."""
UNREAD_MEDIA = ("video", "videos", "video_path", "audio", "audios", "audio_path")
"""Names of what no model here can read, likewise."""
CHECKSUM_DIGITS = 16
"""Hexadecimal digits of an image's checksum in its name."""
PARQUET_ROWS = 32
"""Rows in memory at once, with their images."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of the annotations, not validated yet."""

    file: Path
    number: int
    """Position in the file, from 1; in JSON lines, the line number."""
    value: Any
    """Parsed JSON, or the `json.JSONDecodeError` of an invalid line."""
    image: bytes | None = None
    """File content of an image in a parquet row; `value["image"]` is the path to save it under, which follows from the
    path of the parquet file below the root folder, the row and the content."""

    @property
    def place(self) -> str:
        """Location for messages, `file:number`."""
        return f"{self.file}:{self.number}"


def read_entries(path: Path) -> Iterator[Entry]:
    """Yield every entry at `path`.

    Raises:
        AnnotationsError: the file can't be read, or is not valid JSON; invalid JSON lines are entries.
    """
    if is_parquet(path):
        for part in parquet_files(path):
            yield from read_parquet(part, path if path.is_dir() else path.parent)
        return
    try:
        with open(path, encoding="utf-8-sig") as file:
            while (block := file.read(BLOCK_SIZE)) and not block.strip():
                pass
            is_list = block.lstrip().startswith("[")
            file.seek(0)
            yield from read_list(path, file) if is_list else read_lines(path, file)
    except FileNotFoundError:
        raise AnnotationsError(f"{path}: does not exist; valid: a file of LLaVA conversations") from None
    except (OSError, UnicodeDecodeError) as error:
        raise AnnotationsError(f"{path}: cannot be read as UTF-8 text: {error}") from error


def count_entries(path: Path) -> int:
    """Number of entries at `path`; AnnotationsError if the file can't be read to its end."""
    if is_parquet(path):
        return sum(open_parquet(file).metadata.num_rows for file in parquet_files(path))
    return sum(1 for entry in read_entries(path))


def read_lines(path: Path, file: IO[str]) -> Iterator[Entry]:
    """Yield the entries of JSON lines; blank lines are skipped."""
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                value = error
            except (ValueError, RecursionError) as error:  # too many digits, or brackets in brackets
                value = json.JSONDecodeError(str(error), line, 0)
            yield Entry(path, number, value)


def read_list(path: Path, file: IO[str]) -> Iterator[Entry]:
    """Yield the entries of a JSON list, with no more than a few blocks in memory."""
    decoder = json.JSONDecoder()
    text, lines_before, number = "", 0, 0
    position = 0  # in `text`, where the next entry is expected
    while True:
        try:
            delimiter, start = _next_delimiter(text, position, "[" if number == 0 else ",]")
            if delimiter == "]" or (delimiter == "[" and text.startswith("]", start)):
                break
            value, end = decoder.raw_decode(text, start)
            if end == len(text):
                raise json.JSONDecodeError("Incomplete entry", text, end)  # a number may continue in the next block
        except json.JSONDecodeError as error:
            length = len(text) - position
            more = "" if length > MAX_ENTRY_LENGTH else file.read(max(BLOCK_SIZE, length))
            if not more:
                line = lines_before + text.count("\n", 0, error.pos) + 1
                raise AnnotationsError(f"{path}: line {line} is not valid JSON: {error.msg}") from error
            lines_before += text.count("\n", 0, position)
            text, position = text[position:] + more, 0
            continue
        except (ValueError, RecursionError) as error:  # too many digits, or brackets in brackets
            line = lines_before + text.count("\n", 0, position) + 1
            raise AnnotationsError(f"{path}: the entry at line {line} cannot be read: {error}") from error
        number, position = number + 1, end
        yield Entry(path, number, value)


def _next_delimiter(text: str, position: int, delimiters: str) -> tuple[str, int]:
    """Next delimiter after blanks (one of `delimiters`), and the position of the first non-blank after it."""
    position = _skip_blanks(text, position)
    if position == len(text) or text[position] not in delimiters:
        raise json.JSONDecodeError(f"Expecting one of {delimiters!r}", text, position)
    return text[position], _skip_blanks(text, position + 1)


def _skip_blanks(text: str, position: int) -> int:
    found = NOT_BLANK.search(text, position)
    return found.start() if found else len(text)


# Parquet


def is_parquet(path: Path) -> bool:
    """True if `path` is a parquet file, or a folder: folders can only hold parquet."""
    return path.is_dir() or path.suffix == ".parquet"


def parquet_files(path: Path) -> list[Path]:
    """Parquet files at `path`, sorted by name."""
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise AnnotationsError(f"{path}: no parquet file in this folder; valid: LLaVA conversations as JSON or parquet")
    return files


def open_parquet(file: Path) -> "pyarrow.parquet.ParquetFile":
    """Open a parquet file and check its columns; AnnotationsError if it is unusable."""
    opened = open_any_parquet(file)
    if "conversations" not in (found := opened.schema_arrow.names):
        raise AnnotationsError(f"{file}: has columns {', '.join(found)}; valid: {', '.join(PARQUET_COLUMNS)}")
    return opened


def open_any_parquet(file: Path) -> "pyarrow.parquet.ParquetFile":
    """Open a parquet file, whatever its columns; AnnotationsError if it can't be read."""
    import pyarrow.parquet

    try:
        opened = pyarrow.parquet.ParquetFile(file)
        opened.schema_arrow.names  # noqa: B018  # decodes them
    except FileNotFoundError:
        raise AnnotationsError(f"{file}: does not exist; valid: a file of LLaVA conversations") from None
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # ValueError: names that are no UTF-8
        raise AnnotationsError(f"{file}: cannot be read as parquet: {error}") from error
    return opened


def read_parquet(file: Path, root: Path) -> Iterator[Entry]:
    """Yield the rows of a parquet file.

    An image in a row is named `<path of the file below root>/<row>-<digits of its checksum>.<type>`: files of one name
    in several folders, and data sets that share a folder of images, each keep their own.
    """
    opened = open_parquet(file)
    folder = file.relative_to(root).with_suffix("").as_posix()
    known = (*PARQUET_COLUMNS, *MISNAMED_IMAGES, *UNREAD_MEDIA)
    columns = [name for name in opened.schema_arrow.names if name.strip().casefold() in known]
    for number, row in enumerate(read_parquet_rows(file, opened, columns), start=1):
        image = row.pop("image", None)
        content = image.get("bytes") if isinstance(image, dict) else None
        if isinstance(content, bytes):
            digits = hashlib.sha256(content).hexdigest()[:CHECKSUM_DIGITS]
            image = f"{folder}/{number - 1:07d}-{digits}{suffix_of(content)}"
            yield Entry(file, number, row | {"image": image}, content)
        else:
            yield Entry(file, number, row | {"image": image})


def read_parquet_rows(
    file: Path, opened: "pyarrow.parquet.ParquetFile", columns: list[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of an opened parquet file, of these columns or of all; AnnotationsError if it is damaged."""
    import pyarrow

    number = 0
    try:
        for batch in opened.iter_batches(PARQUET_ROWS, columns=columns):
            for row in rows_of(batch):
                number += 1
                yield row
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # ValueError: of values that Python can't hold
        raise AnnotationsError(f"{file}: is damaged after row {number}: {error}") from error
    if number != opened.metadata.num_rows:
        raise AnnotationsError(f"{file}: is damaged: it states {opened.metadata.num_rows} rows and holds {number}")


def suffix_of(content: bytes) -> str:
    """File name suffix of an image, from its first bytes."""
    signatures = {b"\xff\xd8": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif", b"RIFF": ".webp"}
    return next((suffix for start, suffix in signatures.items() if content.startswith(start)), ".img")
