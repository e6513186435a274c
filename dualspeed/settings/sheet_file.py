"""The file of a sheet of experiments: TSV with one row per trained model; an empty cell means the default."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dualspeed.errors import ConfigError
from dualspeed.settings.reading import did_you_mean

# column -> type of its cells
COLUMNS = {
    "id": str,
    "model": str,
    "method": str,
    "pruner": str,
    "pruning_ratio": float,
    "slow_mode_ratio": float,
    "num_virtual_tokens": int,
    "distillation_weight": float,
    "seed": int,
    "tables": str,
}
REQUIRED = ("id", "model", "method")

# method -> the settings it stands for. A Baseline or NaivePrune has no isolator: nothing would train it, or use it.
METHODS = {
    "baseline": {"slow_mode_ratio": 1.0, "num_virtual_tokens": 0, "distillation_weight": 0.0},
    "naive_prune": {"slow_mode_ratio": 0.0, "num_virtual_tokens": 0, "distillation_weight": 0.0},
    "dualspeed": {},
}


def read_sheet(path: Path) -> list[dict[str, Any]]:
    """Rows as {column: typed value, None for an empty cell}; blank lines and lines starting with # are left out.

    Raises:
        ConfigError: no file, no row, a mistyped column, a cell of another type, a missing or repeated id.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; valid: a tab-separated sheet of experiments")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = [line for line in csv.reader(file, delimiter="\t") if any(line) and not line[0].startswith("#")]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: not readable as text ({error}); valid: tab-separated UTF-8") from None
    columns, *rows = lines or [[]]
    _check_columns(columns, path)
    if not rows:
        raise ConfigError(f"{path}: no row; valid: one row per trained model")
    seen: set[str] = set()
    return [_read_row(columns, cells, seen, path) for cells in rows]


def resolve_cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """The method's settings, then the row's cells.

    Raises:
        ConfigError: a cell contradicts its method; repeating one of its settings is fine.
    """
    settings = dict(METHODS[row["method"]])
    for column in ("pruner", "pruning_ratio", "slow_mode_ratio", "num_virtual_tokens", "distillation_weight"):
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


def _check_columns(columns: list[str], path: Path) -> None:
    for column in columns:
        if column not in COLUMNS:
            hint = did_you_mean(column, COLUMNS)
            raise ConfigError(
                f"{path}: column {column!r} is unknown{hint}; valid: {', '.join(COLUMNS)} (tab-separated)"
            )
        if columns.count(column) > 1:
            raise ConfigError(f"{path}: column {column!r} is there twice; valid: each column once")
    for column in REQUIRED:
        if column not in columns:
            raise ConfigError(f"{path}: column {column!r} is missing; valid: {', '.join(COLUMNS)} (tab-separated)")


def _read_row(columns: list[str], cells: list[str], seen: set[str], path: Path) -> dict[str, Any]:
    row = dict.fromkeys(COLUMNS)
    identifier = cells[columns.index("id")].strip() if columns.index("id") < len(cells) else ""
    where = f"{path}: row {identifier or cells}"
    if len(cells) > len(columns):
        raise ConfigError(f"{where}: {len(cells)} cells; valid: {len(columns)}, one per column")
    for column, cell in zip(columns, cells, strict=False):
        row[column] = _read_cell(COLUMNS[column], cell.strip(), f"{where}: {column}")
    for column in REQUIRED:
        if row[column] is None:
            raise ConfigError(f"{where}: {column}: empty; valid: a value in every row")
    if identifier in seen:
        raise ConfigError(f"{where}: id: used by an earlier row; valid: an id of its own")
    seen.add(identifier)
    return row


def _read_cell(kind: type, cell: str, where: str) -> Any:
    try:
        return kind(cell) if cell else None
    except ValueError:
        raise ConfigError(f"{where}: {cell!r} is no {kind.__name__}; valid: {kind.__name__}, or empty") from None
