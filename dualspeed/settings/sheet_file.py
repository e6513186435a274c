"""The file of a sheet of experiments: TSV with one row per trained model; an empty cell means the default."""

import csv
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dualspeed.errors import ConfigError
from dualspeed.settings.reading import did_you_mean, quote

# column -> type of its cells
COLUMNS = {
    "id": str,
    "model": str,
    "method": str,
    "pruner": str,
    "pruning_ratio": float,
    "slow_mode_ratio": float,
    "slow_steps": int,
    "num_virtual_tokens": int,
    "distillation_weight": float,
    "max_steps": int,
    "seed": int,
    "tables": str,
}
# type -> what a cell of it looks like; Python's own `int` and `float` read 1_0 too, and digits of other scripts
NUMBERS = {
    int: re.compile(r"[+-]?[0-9]+"),
    float: re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|nan|[+-]?inf", re.IGNORECASE),
}
LINE_END = re.compile(r"\r\n|\r|\n")
REQUIRED = ("id", "model", "method")
SETTINGS = (
    *("pruner", "pruning_ratio", "slow_mode_ratio", "slow_steps"),
    *("num_virtual_tokens", "distillation_weight"),
)
"""Columns that are settings of the method."""

# method -> the settings it stands for. A Baseline or NaivePrune has no isolator: nothing would train it, or use it.
METHODS = {
    "baseline": {"slow_mode_ratio": 1.0, "num_virtual_tokens": 0, "distillation_weight": 0.0},
    "naive_prune": {"slow_mode_ratio": 0.0, "num_virtual_tokens": 0, "distillation_weight": 0.0},
    "dualspeed": {},
}


def read_sheet(path: Path) -> list[dict[str, Any]]:
    """Rows as {column: typed value, None for an empty cell}; blank lines and lines starting with # are left out.

    Quotes, blanks around cells, byte order marks and every kind of line end are read, as spreadsheets write them.

    Raises:
        ConfigError: no file, no row, a mistyped column, a row with fewer or more cells than columns, a cell of another
            type, a missing or repeated id.
    """
    if not os.path.isfile(path):  # Path.is_file fails at a name that is too long
        raise ConfigError(f"{str(path)[:200]}: no such file; valid: a tab-separated sheet of experiments")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not readable as text ({error}); valid: tab-separated UTF-8") from None
    lines = [
        (number, cells)
        for number, line in enumerate(LINE_END.split(text), start=1)
        if any(cells := _split_line(line, f"{path}, line {number}")) and not cells[0].startswith("#")
    ]
    (_, columns), *rows = lines or [(1, [])]
    _check_columns(columns, path)
    if not rows:
        raise ConfigError(f"{path}: no row; valid: one row per trained model")
    seen: dict[str, int] = {}
    return [_read_row(columns, cells, number, seen, path) for number, cells in rows]


def resolve_cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """The method's settings, then the row's cells.

    Raises:
        ConfigError: a cell contradicts its method; repeating one of its settings is fine.
    """
    settings = dict(METHODS[row["method"]])
    if row["slow_steps"] is not None and row["method"] != "dualspeed":
        raise ConfigError(f"slow_steps: {row['slow_steps']} contradicts the method {row['method']}; valid: empty")
    for column in SETTINGS:
        cell = row[column]
        if cell is None:
            continue
        if row["method"] == "baseline" and column in ("pruner", "pruning_ratio"):
            raise ConfigError(f"{column}: {cell!r} in a row of method baseline, which does not prune; valid: empty")
        if column in settings and settings[column] != cell:
            valid = f"{settings[column]:g}, or empty"
            raise ConfigError(f"{column}: {cell:g} contradicts the method {row['method']}; valid: {valid}")
        settings[column] = cell
    return settings


def _split_line(line: str, where: str) -> list[str]:
    """Cells of a line, without the quotes and blanks around them."""
    if line.lstrip().startswith("#"):
        return []  # a quote in a comment opens no cell
    try:
        return [cell.strip() for cells in csv.reader([line], delimiter="\t", strict=True) for cell in cells]
    except csv.Error as error:
        valid = "valid: each cell in one line, quotes on both sides or none"
        raise ConfigError(f"{where}: quotes that don't match ({error}); {valid}") from None


def _check_columns(columns: list[str], path: Path) -> None:
    for number, column in enumerate(columns, start=1):
        if not column:
            raise ConfigError(f"{path}: column {number} has no name; valid: {', '.join(COLUMNS)} (tab-separated)")
        if column not in COLUMNS:
            hint = did_you_mean(column, COLUMNS)
            raise ConfigError(
                f"{path}: column {quote(column)} is unknown{hint}; valid: {', '.join(COLUMNS)} (tab-separated)"
            )
        if columns.count(column) > 1:
            raise ConfigError(f"{path}: column {column!r} is there twice; valid: each column once")
    for column in REQUIRED:
        if column not in columns:
            raise ConfigError(f"{path}: column {column!r} is missing; valid: {', '.join(COLUMNS)} (tab-separated)")


def _read_row(columns: list[str], cells: list[str], line: int, seen: dict[str, int], path: Path) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    identifier = dict(zip(columns, cells, strict=False)).get("id", "")
    where = f"{path}: row {identifier or f'in line {line}'}"
    _check_number(columns, cells, where)
    for column, cell in zip(columns, cells, strict=True):
        row[column] = _read_cell(COLUMNS[column], cell, f"{where}: {column}")
    for column in REQUIRED:
        if row[column] is None:
            raise ConfigError(f"{where}: {column}: empty; valid: a value in every row")
    if identifier in seen:
        raise ConfigError(f"{where}: id: used by an earlier row, in line {seen[identifier]}; valid: an id of its own")
    seen[identifier] = line
    return row


def _check_number(columns: list[str], cells: list[str], where: str) -> None:
    """Raise ConfigError unless a row has a cell for each column; it names the column where the row goes wrong."""
    if len(cells) == len(columns):
        return
    valid = f"{len(cells)} cells; valid: {len(columns)}, one per column, empty ones too"
    for column, cell in zip(columns, cells, strict=False):
        try:
            _read_cell(COLUMNS[column], cell, column)
        except ConfigError as error:
            raise ConfigError(f"{where}: {valid}: a tab is lost or too many before {error}") from None
    place = f"behind {columns[-1]}" if len(cells) > len(columns) else f"none for {columns[len(cells)]}"
    raise ConfigError(f"{where}: {valid} ({place})")


def _read_cell(kind: type, cell: str, where: str) -> Any:
    if not cell or kind is str:
        return cell or None
    if NUMBERS[kind].fullmatch(cell):
        with suppress(ValueError):  # more digits than Python reads
            return kind(cell)
    with_point = cell.replace(",", ".")
    hint = f" (write {with_point})" if with_point != cell and NUMBERS[kind].fullmatch(with_point) else ""
    raise ConfigError(f"{where}: {quote(cell)} is no {kind.__name__}{hint}; valid: {kind.__name__}, or empty")
