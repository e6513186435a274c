"""Rows of a recipe's sources: JSON, JSON lines, parquet, saved datasets and the Hub, each by the same function.

Memory doesn't grow with the data: files are read in pieces, and the Hub's datasets are streamed. Images stay as they
are stored, {bytes, path}; nothing is decoded here.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualspeed.data.annotations import (
    PARQUET_ROWS,
    count_entries,
    open_any_parquet,
    parquet_files,
    read_entries,
    read_parquet_rows,
)
from dualspeed.data.arrow_rows import rows_of
from dualspeed.data.rows import check_columns
from dualspeed.errors import AnnotationsError, DownloadError
from dualspeed.settings.data_source import DataSource

# Imported inside the functions that use it: it comes with the workflow, and JSON files don't need it.
if TYPE_CHECKING:
    import datasets

SAVED, SAVED_SPLITS = "dataset_info.json", "dataset_dict.json"
"""Files in a folder that `save_to_disk` wrote: of one dataset, of several splits."""
TRAIN = "train"


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row of a source, not validated yet."""

    name: str
    """Id of a row that has none: name of its file or dataset, and its number there, from 1 (JSON lines: the line)."""
    place: str
    """Location for messages: the same with the whole path."""
    value: Any
    """Column -> value, or the `json.JSONDecodeError` of an invalid line."""


@dataclass(frozen=True)
class OpenedSource:
    """A source that can be read, once."""

    rows: Iterator[SourceRow]
    """The rows that the source's `share` or `limit` takes."""
    num_rows: int | None
    """Their number, of the Hub's the most there may be; None: not known before they are read."""
    revision: str | None = None
    """Commit of the Hub's dataset."""


def iter_rows(source: DataSource) -> Iterator[SourceRow]:
    """Yield the rows that a source takes; errors as of `open_source`."""
    yield from open_source(source).rows


def open_source(source: DataSource) -> OpenedSource:
    """Open a source and check its columns.

    Raises:
        AnnotationsError: it can't be read, has no rows, or columns of no format.
        DownloadError: the Hub refuses.
    """
    if source.path is None:
        return open_hub(source)
    path = Path(source.path)
    is_saved = (path / SAVED).is_file() or (path / SAVED_SPLITS).is_file()
    if source.split is not None and not is_saved:
        raise AnnotationsError(f"{path}: split {source.split!r} of what has none; valid: null, or a saved dataset")
    if is_saved:
        dataset = load_saved(path, source.split)
        check_columns(dataset.column_names, source.name, source.format)
        return OpenedSource(taken(source, tables_rows(dataset, source)), source.num_taken(len(dataset)))
    if path.is_dir() or path.suffix == ".parquet":
        files, num_rows = parquet_files(path), 0
        for file in files:
            opened = open_any_parquet(file)
            check_columns(opened.schema_arrow.names, str(file), source.format)
            num_rows += opened.metadata.num_rows
        rows = (
            (str(file), number, row)
            for file in files
            for number, row in enumerate(read_parquet_rows(file, open_any_parquet(file)), start=1)
        )
        return OpenedSource(taken(source, rows), source.num_taken(num_rows))
    entries = ((source.name, entry.number, entry.value) for entry in read_entries(path))
    return OpenedSource(taken(source, entries), source.num_taken(count_entries(path)))


def taken(source: DataSource, rows: Iterable[tuple[str, int, Any]]) -> Iterator[SourceRow]:
    """Yield those of all rows that a source takes.

    Args:
        rows: name of the file or dataset, number in it, and content of each.
    """
    for place, (name, number, value) in enumerate(rows):
        if source.limit is not None and place >= source.limit:
            return
        if source.takes(place):
            yield SourceRow(f"{Path(name).name}:{number}", f"{name}:{number}", value)


def load_saved(path: Path, split: str | None) -> "datasets.Dataset":
    """Load a dataset that `save_to_disk` wrote, in place; AnnotationsError if it can't be read."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # of any kind: those of Arrow, of JSON, and of files
        raise AnnotationsError(f"{path}: cannot be read as a saved dataset: {in_one_line(error)}") from error
    splits = {None: loaded} if isinstance(loaded, datasets.Dataset) else dict(loaded)
    chosen = split if split is not None or None in splits else TRAIN
    if chosen not in splits:
        valid = "null: it has one" if None in splits else ", ".join(map(str, splits))
        raise AnnotationsError(f"{path}: has no split {chosen!r}; valid: {valid}")
    return splits[chosen]


def open_hub(source: DataSource) -> OpenedSource:
    """Open a dataset of the Hub, as a stream of its newest commit."""
    import datasets
    from huggingface_hub import HfApi, constants

    try:
        revision = HfApi().dataset_info(str(source.hub)).sha
        split = source.split or TRAIN
        dataset = datasets.load_dataset(source.hub, source.config, split=split, revision=revision, streaming=True)
        columns = dataset.column_names or [*next(iter(dataset), {})]
    except Exception as error:  # of any kind: those of HTTP clients, of the Hub, and of each file format
        valid = f"valid: a dataset on {constants.ENDPOINT}, with its configuration and split; HF_TOKEN if it is gated"
        raise DownloadError(f"{source.name}: cannot be loaded: {in_one_line(error)}; {valid}") from error
    check_columns(columns, source.name, source.format)
    return OpenedSource(taken(source, tables_rows(dataset, source)), source.limit, revision)


def tables_rows(
    dataset: "datasets.Dataset | datasets.IterableDataset", source: DataSource
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield (name of the source, number from 1, row) of a dataset, from its tables, in which images aren't decoded."""
    tables, number = dataset.with_format("arrow").iter(PARQUET_ROWS), 0
    while True:
        try:
            rows = rows_of(next(tables))
        except StopIteration:
            return
        except Exception as error:  # of any kind: those of Arrow, of files, of HTTP clients
            if source.hub is not None:
                raise DownloadError(f"{source.name}: broke off after row {number}: {in_one_line(error)}") from error
            raise AnnotationsError(f"{source.name}: is damaged after row {number}: {in_one_line(error)}") from error
        for row in rows:
            number += 1
            yield source.name, number, row


def in_one_line(error: Exception) -> str:
    """Return the first line of another program's error."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
