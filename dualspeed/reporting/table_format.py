"""A table as numbers (csv) and as a person reads it (Markdown, LaTeX)."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from tabulate import tabulate

from dualspeed.files import write_atomic
from dualspeed.reporting.frames import to_csv

NOT_RUN = "not run"
NOT_APPLICABLE = "-"
TEXT_COLUMNS = ("Model", "Method", "Training", "Pruner", "Inference")  # set to the left
LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"},
    "±": "$\\pm$",
}


@dataclass(frozen=True)
class Table:
    """One table: `numbers` for programs, `cells` (all text) for people, and what a reader has to know."""

    name: str
    title: str
    numbers: pd.DataFrame
    cells: pd.DataFrame
    notes: tuple[str, ...] = ()
    best: frozenset[tuple[int, str]] = frozenset()
    """(row, column) of the cells that are set in bold."""
    grey: tuple[str, ...] = ()
    """Columns that hold the paper's numbers, not ours."""


def write_table(table: Table, out: Path) -> None:
    """Write `<name>.csv`, `.md` and `.tex` under `out`."""
    write_atomic(out / f"{table.name}.csv", to_csv(table.numbers))
    write_atomic(out / f"{table.name}.md", to_markdown(table))
    write_atomic(out / f"{table.name}.tex", to_latex(table))


def to_markdown(table: Table) -> str:
    """Title, pipe table and notes; aligned, so that it reads well in a terminal too."""
    alignment = ["left" if is_text(column) else "right" for column in table.cells] if len(table.cells) else None
    columns = list(table.cells)
    body = tabulate(table.cells, columns, "pipe", showindex=False, disable_numparse=True, colalign=alignment)
    # A blank line between notes: Markdown would join them into one paragraph.
    return "\n\n".join([f"**{table.title}**", body, *table.notes]) + "\n"


def to_latex(table: Table) -> str:
    """A table environment with booktabs rules, the width of the text; a rule between models, best in bold."""
    columns = list(table.cells)
    lines = []
    for row, cells in enumerate(table.cells.to_dict("records")):
        if row and "Model" in cells and cells["Model"] != table.cells["Model"].iloc[row - 1]:
            lines.append("\\midrule")
        lines.append(" & ".join(_latex_cell(table, row, column, cells[column]) for column in columns) + " \\\\")
    header = " & ".join(_grey(escape(column), column in table.grey) for column in columns)
    notes = "".join(f"\\par\\smallskip\\footnotesize {escape(note)}\n" for note in table.notes)
    alignment = "".join("l" if is_text(column) else "r" for column in columns)
    return "\n".join(
        [
            "% Needs \\usepackage{booktabs,graphicx,xcolor}.",
            "\\begin{table}",
            "\\centering",
            f"\\caption{{{escape(table.title)}}}",
            f"\\label{{tab:{table.name}}}",
            "\\resizebox{\\linewidth}{!}{%",
            f"\\begin{{tabular}}{{{alignment}}}",
            "\\toprule",
            f"{header} \\\\",
            "\\midrule",
            *lines,
            "\\bottomrule",
            f"\\end{{tabular}}}}\n{notes}\\end{{table}}\n",
        ]
    )


def find_best(rows: pd.DataFrame, columns: dict[str, str], group: Callable[[pd.Series], object]) -> frozenset:
    """(row, label) of the highest number of each {label: column} among the rows of a group; equal as shown: all.

    `group` says what a row competes with, None for a row that doesn't compete. Alone in its group, none is best.
    """
    groups: dict[object, list[int]] = {}
    for position, (_, row) in enumerate(rows.iterrows()):
        groups.setdefault(group(row), []).append(position)
    best = set()
    for key, members in groups.items():
        for label, column in columns.items():
            values = rows[column].iloc[members].astype(float).round(1)
            if key is not None and values.notna().sum() > 1:
                best |= {(at, label) for at, value in zip(members, values, strict=True) if value == values.max()}
    return frozenset(best)


def is_text(column: str) -> bool:
    """Whether a column holds words and is set to the left."""
    return column in TEXT_COLUMNS


def escape(text: str) -> str:
    """Text as LaTeX prints it."""
    return "".join(LATEX.get(character, character) for character in text)


def format_number(value: float, digits: int = 1, unit: str = "") -> str:
    """`value` with a fixed number of decimals, or that it has not run."""
    return NOT_RUN if pd.isna(value) else f"{value:.{digits}f}{unit}"


def format_mean(mean: float, std: float) -> str:
    """`mean ± std`; the mean alone where there is one seed."""
    return format_number(mean) if pd.isna(std) else f"{mean:.1f} ± {std:.1f}"


def format_setting(value: object) -> str:
    """A setting as it stands in the sheet, or that there is none."""
    if pd.isna(value):
        return NOT_APPLICABLE
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _latex_cell(table: Table, row: int, column: str, text: str) -> str:
    text = escape(text)
    text = f"\\textbf{{{text}}}" if (row, column) in table.best else text
    return _grey(text, column in table.grey or text == NOT_RUN)


def _grey(text: str, is_grey: bool) -> str:
    return f"\\textcolor{{gray}}{{{text}}}" if is_grey and text else text
