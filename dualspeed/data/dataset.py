"""Datasets of conversations for a trainer: rows of any format become records, and unusable ones are left out.

Map-style datasets are checked before training, images included; streams while they are read. Every row that is left out
is counted in the log and listed in a file.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from torch.utils.data import Dataset, IterableDataset
from tqdm import tqdm

from dualspeed.data.conversations import Problem
from dualspeed.data.images import inspect_image
from dualspeed.data.manifest import count_reasons
from dualspeed.data.rows import ToMessages, check_columns, read_row
from dualspeed.data.supervision import Supervision
from dualspeed.errors import PreparationError, SupervisionError
from dualspeed.files import write_atomic

logger = logging.getLogger(__name__)

AHEAD = 256
"""Rows that are checked at once."""
RENDERING = Lock()
"""Held while a template is rendered: transformers tracks the answers of one rendering at a time."""
NUM_SHOWN = 3
"""Unusable rows that an error shows; the file lists all."""


@dataclass(frozen=True)
class Reading:
    """How the rows of a dataset are read, and what happens with unusable ones."""

    name: str
    """Name of the dataset in messages: `train_dataset`."""
    file: Path
    """JSON lines, one for each unusable row, {row, id, reason, detail}."""
    to_messages: ToMessages | None = None
    """Function that makes of a row one of a known format; None: rows are such."""
    max_dropped_share: float = 0.05
    """Largest share of unusable rows."""
    supervision: Supervision | None = None
    """Chat template that the rows are rendered with, which may refuse one; None: not known."""

    def read(self, number: int, row: Any) -> dict[str, Any] | Problem:
        """Record of row `number`, or what makes it unusable."""
        return read_row(row, f"row {number}", to_messages=self.to_messages)

    def check(self, number: int, row: Any) -> dict[str, Any] | Problem:
        """Record of row `number` with its images looked at, or what makes it unusable."""
        record = self.read(number, row)
        if isinstance(record, Problem):
            return record
        for source in record["images"]:
            report = inspect_image(source)
            if report.reason is not None:
                detail = f"{report.path} {report.detail}".strip()
                return Problem(record["id"], f"row {number}", report.reason, detail)
        try:
            if self.supervision is not None:
                with RENDERING:
                    self.supervision.render(record["messages"])
        except SupervisionError as error:
            return Problem(record["id"], f"row {number}", "refused by the chat template", str(error))
        return record


class Conversations(Dataset):
    """Usable rows of a map-style dataset, as records."""

    def __init__(self, rows: Sequence[Any], numbers: Sequence[int], reading: Reading) -> None:
        self.rows, self.numbers, self.reading = rows, numbers, reading

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = self.numbers[index]
        record = self.reading.read(number, self.rows[number])
        if isinstance(record, Problem):
            raise PreparationError(f"{self.reading.name}: row {number} changed after it was checked: {record.reason}")
        return record


class ConversationStream(IterableDataset):
    """Usable rows of an iterable dataset, as records. Too large a share of unusable ones ends it with an error."""

    def __init__(self, rows: Iterable[Any], reading: Reading) -> None:
        self.rows, self.reading = rows, reading

    def set_epoch(self, epoch: int) -> None:
        """Tell the dataset the epoch, which its shuffling may depend on."""
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        problems: list[Problem] = []
        num_rows = 0
        for num_rows, row in enumerate(self.rows, start=1):
            record = self.reading.check(num_rows - 1, row)
            if not isinstance(record, Problem):
                yield record
                continue
            problems.append(record)
            with open(self.reading.file, "a", encoding="utf-8") as file:  # workers append whole lines
                file.write(line_of(num_rows - 1, record))
            if len(problems) > self.reading.max_dropped_share * max(num_rows, AHEAD):
                raise PreparationError(too_many(self.reading, problems, num_rows))
        if problems:
            logger.warning(summary(self.reading, problems, num_rows))


def read_conversations(dataset: Any, reading: Reading, first: Callable[..., Any]) -> Any:
    """Dataset of records of a dataset of rows; of None and of a dict of datasets the same form.

    Args:
        first: context in which one process of a machine runs before the others (`args.main_process_first`).

    Raises:
        AnnotationsError: no column means anything.
        PreparationError: too large a share of the rows is unusable.
    """
    if dataset is None or isinstance(dataset, str):
        return dataset
    if isinstance(dataset, dict):
        names = {name: f"{reading.name} {name}" for name in dataset}
        files = {name: reading.file.with_name(f"{reading.file.stem}_{name}{reading.file.suffix}") for name in dataset}
        parts = {name: replace(reading, name=names[name], file=files[name]) for name in names}
        return {name: read_conversations(rows, parts[name], first) for name, rows in dataset.items()}
    if reading.to_messages is None:
        columns = getattr(dataset, "column_names", None)
        if columns is not None:
            check_columns(columns, reading.name)
        dataset = without_decoding(dataset)
    if not hasattr(dataset, "__len__"):
        reading.file.parent.mkdir(parents=True, exist_ok=True)
        return ConversationStream(dataset, reading)
    with first(desc=f"{reading.name}: checking rows"):
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            check_rows(dataset, reading)
    return Conversations(dataset, usable_numbers(len(dataset), reading.file), reading)


def check_rows(rows: Sequence[Any], reading: Reading) -> None:
    """Read every row and look at its images; write what is unusable to the file, count it, and stop at too much."""
    problems: dict[int, Problem] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in tqdm(
            range(0, len(rows), AHEAD), desc=f"Checking {reading.name}", unit=f" x {AHEAD} rows", leave=False
        ):
            numbers = range(start, min(start + AHEAD, len(rows)))
            found = pool.map(partial(check_row, rows, reading), numbers)
            problems |= {
                number: record for number, record in zip(numbers, found, strict=True) if isinstance(record, Problem)
            }
            allowed = reading.max_dropped_share * len(rows)
            if len(problems) > allowed or len(problems) == len(rows):
                raise PreparationError(too_many(reading, [*problems.values()], numbers.stop))
    lines = "".join(line_of(number, problem) for number, problem in problems.items())
    reading.file.parent.mkdir(parents=True, exist_ok=True)
    if lines or reading.file.exists():
        write_atomic(reading.file, lines)
    if problems:
        logger.warning(summary(reading, [*problems.values()], len(rows)))


def check_row(rows: Sequence[Any], reading: Reading, number: int) -> dict[str, Any] | Problem:
    """Check one row of a dataset; what the dataset itself can't read is a problem of the row."""
    try:
        row = rows[number]
    except Exception as error:  # of any kind: the dataset is the caller's
        return Problem(f"row {number}", f"row {number}", "cannot be read", f"{type(error).__name__}: {error}")
    return reading.check(number, row)


def usable_numbers(num_rows: int, file: Path) -> Sequence[int]:
    """Numbers of the rows that a file of `check_rows` doesn't list."""
    if not file.exists():
        return range(num_rows)
    dropped = {json.loads(line)["row"] for line in file.read_text(encoding="utf-8").splitlines()}
    return [number for number in range(num_rows) if number not in dropped]


def without_decoding(dataset: Any) -> Any:
    """Dataset of Hugging Face with images as {bytes, path}, so that our rules decode them; others as they are."""
    features = getattr(dataset, "features", None)
    if features is None or not hasattr(dataset, "cast_column"):
        return dataset
    for name, feature in dict(features).items():
        if (encoded := as_encoded(feature)) is not None:
            dataset = dataset.cast_column(name, encoded)
    return dataset


def as_encoded(feature: Any) -> Any:
    """Feature with encoded images in the place of decoded ones; None if it has no images."""
    kind = type(feature).__name__
    if kind == "Image":
        return type(feature)(decode=False)
    if kind in ("List", "LargeList", "Sequence") and (inner := as_encoded(feature.feature)) is not None:
        return type(feature)(inner)
    return None


def line_of(number: int, problem: Problem) -> str:
    """Line of the file for an unusable row."""
    entry = {"row": number, "id": problem.id, "reason": problem.reason, "detail": problem.detail}
    return json.dumps(entry, ensure_ascii=False) + "\n"


def summary(reading: Reading, problems: Sequence[Problem], num_rows: int) -> str:
    """Sentence that counts unusable rows by reason."""
    reasons = ", ".join(f"{count} x {reason}" for reason, count in count_reasons(problems).items())
    return f"{reading.name}: {len(problems)} of {num_rows} rows cannot be used: {reasons}; {reading.file} lists them"


def too_many(reading: Reading, problems: Sequence[Problem], num_rows: int) -> str:
    """Sentence for the error of too many unusable rows."""
    reasons = ", ".join(f"{count} x {reason}" for reason, count in count_reasons(problems).items())
    shown = "".join(f"\n  {problem.file}: {problem.reason}: {problem.detail}" for problem in problems[:NUM_SHOWN])
    return (
        f"{reading.name}: {len(problems)} of the first {num_rows} rows cannot be used, and max_dropped_share "
        f"{reading.max_dropped_share} allows fewer: {reasons}; the first of them:{shown}"
    )
