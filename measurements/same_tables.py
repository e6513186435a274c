"""Compare two sheets' tables cell by cell: has a change of the code changed a result?

    python -m measurements.same_tables OLD NEW

OLD and NEW are folders of tables (results/tables/demo). Every csv and every Markdown table of OLD has to be in NEW with
the same rows, columns and cells. Columns that hold measured times or memory, and the names of folders, are left out:
they differ from run to run. Prints each difference and what it compared; exit status 1 if anything differs.
"""

import argparse
import re
import sys
from pathlib import Path

import pandas as pd

MEASURED = re.compile(
    r"seconds|hours|speedup_measured|share_of_limit|pruner_share|samples_per_second|peak_memory|^pretrain$"
    r"|^(Fast|Slow|Baseline) step|^Speedup$|^Of limit$|^In pruner$|^(Train|Pretrain|Finetune) \("
    r"|^Samples/s$|^Memory|^GPU hours$"
)
"""Columns that differ from run to run."""


def main() -> int:
    """Compare the folders that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args()
    files = sorted([*options.old.glob("*.csv"), *options.old.glob("*.md")])
    if not files:
        parser.error(f"{options.old}: no csv or md file in this folder")
    differences, num_cells = [], 0
    for file in files:
        found, compared = compare(file, options.new / file.name)
        differences += found
        num_cells += compared
    print("\n".join([*differences, f"{len(files)} files, {num_cells} cells compared, {len(differences)} differ"]))
    return 1 if differences else 0


def compare(old: Path, new: Path) -> tuple[list[str], int]:
    """Differences between two files of one table, and the number of cells compared."""
    if not new.exists():
        return [f"{new}: missing"], 0
    before, after = read_table(old), read_table(new)
    if list(before.columns) != list(after.columns) or len(before) != len(after):
        return [f"{new}: {after.shape} cells with other columns or rows than {before.shape} before"], 0
    columns = [column for column in before.columns if not MEASURED.search(column)]
    differences = [
        f"{new}, row {row + 1}, {column}: {after.at[row, column]!r}, was {before.at[row, column]!r}"
        for column in columns
        for row in range(len(before))
        if before.at[row, column] != after.at[row, column]
    ]
    return differences, len(columns) * len(before)


def read_table(file: Path) -> pd.DataFrame:
    """Cells of a csv or Markdown table as text."""
    if file.suffix == ".csv":
        return pd.read_csv(file, dtype=str, keep_default_na=False)
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return pd.DataFrame(rows, columns=header, dtype=str)


if __name__ == "__main__":
    sys.exit(main())
