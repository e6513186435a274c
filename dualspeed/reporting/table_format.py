"""Formats of a table: numbers (csv) for programs, text (Markdown, LaTeX) for people."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from tabulate import tabulate

from dualspeed.files import write_atomic
from dualspeed.reporting.frames import to_csv

NOT_RUN = "not run"
NOT_APPLICABLE = "-"
NO_RATIO = "Baseline is 0"
TEXT_COLUMNS = ("Model", "Method", "Training", "Pruner", "Inference")  # aligned left
LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"},
    "±": "$\\pm$",
}
# Commands around a cell's text, as pandas' Styler writes them in LaTeX; the first is outermost.
GREY, BOLD = "textcolor:{gray}--rwrap;", "textbf:--rwrap;"


@dataclass(frozen=True)
class Table:
    """One table, as numbers and as text."""

    name: str
    """Name of its files."""
    title: str
    """Caption."""
    numbers: pd.DataFrame
    """Content of the csv file."""
    cells: pd.DataFrame
    """Text of each cell, for Markdown, LaTeX and HTML."""
    notes: tuple[str, ...] = ()
    """Remarks below the table."""
    best: frozenset[tuple[int, str]] = frozenset()
    """(row, column) of the cells in bold."""
    grey: tuple[str, ...] = ()
    """Columns with the paper's numbers instead of ours."""


def write_table(table: Table, out: Path) -> None:
    """Write `<name>.csv`, `.md` and `.tex` under `out`."""
    write_atomic(out / f"{table.name}.csv", to_csv(table.numbers))
    write_atomic(out / f"{table.name}.md", to_markdown(table))
    write_atomic(out / f"{table.name}.tex", to_latex(table))


def to_markdown(table: Table) -> str:
    """Title, pipe table and notes; columns are padded, so that it reads well in a terminal too."""
    columns = list(table.cells)
    alignment = ["left" if is_text(column) else "right" for column in columns] if len(table.cells) else None
    body = tabulate(table.cells, columns, "pipe", showindex=False, disable_numparse=True, colalign=alignment)
    # A blank line between notes: Markdown would join them into one paragraph.
    return "\n\n".join([f"**{table.title}**", body, *table.notes]) + "\n"


def to_latex(table: Table) -> str:
    """A table environment as wide as the text, with booktabs rules, and a rule between models."""
    columns = list(table.cells)
    styler = table.cells.style.hide(axis="index").format(escape).format_index(escape, axis="columns")
    if "Model" in table.cells:
        models = table.cells["Model"]
        changes = models[models.ne(models.shift()) & (models.index > 0)].index
        styler = styler.format(lambda text: f"\\midrule\n{escape(text)}", subset=(changes, columns[:1]))
    styler = styler.apply(lambda _: cell_styles(table), axis=None)
    styler = styler.apply_index(lambda names: [GREY if name in table.grey else "" for name in names], axis="columns")
    alignment = "".join("l" if is_text(column) else "r" for column in columns)
    notes = "".join(f"\\par\\smallskip\\footnotesize {escape(note)}\n" for note in table.notes)
    return (
        "% Needs \\usepackage{booktabs,graphicx,xcolor}.\n"
        "\\begin{table}\n\\centering\n"
        f"\\caption{{{escape(table.title)}}}\n\\label{{tab:{table.name}}}\n"
        "\\resizebox{\\linewidth}{!}{%\n"
        f"{styler.to_latex(hrules=True, column_format=alignment).rstrip()}}}\n"
        f"{notes}\\end{{table}}\n"
    )


def cell_styles(table: Table) -> pd.DataFrame:
    """Style of each cell for pandas' Styler: grey for the paper's numbers and what has not run, bold for the best."""
    styles = {
        column: [
            (GREY if text == NOT_RUN or (text and column in table.grey) else "")
            + (BOLD if (row, column) in table.best else "")
            for row, text in enumerate(texts)
        ]
        for column, texts in table.cells.items()
    }
    return pd.DataFrame(styles, index=table.cells.index, columns=table.cells.columns, dtype=object)


def find_best(rows: pd.DataFrame, columns: dict[str, str], group: Callable[[pd.Series], object]) -> frozenset:
    """(row, label) of the highest number of each {label: column} within each group of rows.

    Numbers that look equal with one decimal are all best. A row alone in its group has none.

    Args:
        group: row -> key of its group, None for a row that is not compared.
    """
    groups: dict[object, list[int]] = {}
    for position, (_, row) in enumerate(rows.iterrows()):
        groups.setdefault(group(row), []).append(position)
    best = set()
    for key, positions in groups.items():
        for label, column in columns.items():
            values = rows[column].iloc[positions].astype(float).round(1).replace(np.inf, np.nan)
            if key is not None and values.notna().sum() > 1:
                best |= {(at, label) for at, value in zip(positions, values, strict=True) if value == values.max()}
    return frozenset(best)


def is_text(column: str) -> bool:
    """True if a column holds words and is aligned left."""
    return column in TEXT_COLUMNS


def escape(text: str) -> str:
    """`text` with LaTeX's special characters escaped."""
    return "".join(LATEX.get(character, character) for character in text)


def format_number(value: float, digits: int = 1, unit: str = "") -> str:
    """`value` with a fixed number of decimals and its unit; NOT_RUN for NaN."""
    return NOT_RUN if pd.isna(value) else f"{value:.{digits}f}{unit}"


def format_mean(mean: float, std: float) -> str:
    """`mean ± std`; the mean alone if there is one seed."""
    return format_number(mean) if pd.isna(std) else f"{mean:.1f} ± {std:.1f}"


def format_gain(gain: float | None, interval: np.ndarray | None = None) -> str:
    """Change of Rel. with its interval; empty for the line that has none before it."""
    if gain is None:
        return ""
    ends = "" if interval is None else " [{:+.2f}, {:+.2f}]".format(*interval)
    return NO_RATIO if np.isinf(gain) else NOT_RUN if pd.isna(gain) else f"{gain:+.2f}{ends}"


def format_setting(value: object) -> str:
    """A setting as the sheet writes it; NOT_APPLICABLE for an empty one."""
    if pd.isna(value):
        return NOT_APPLICABLE
    return f"{value:g}" if isinstance(value, int | float) else str(value)
