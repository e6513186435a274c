"""A table as numbers (csv) and as a person reads it (Markdown, LaTeX)."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from tabulate import tabulate

from dualspeed.files import write_atomic
from dualspeed.results import to_csv

NOT_RUN = "not run"
NOT_APPLICABLE = "-"
TEXT_COLUMNS = ("Model", "Method", "Training", "Pruner", "Inference")  # set to the left


@dataclass(frozen=True)
class Table:
    """One table: `numbers` for programs, `cells` (all text) for people, and what a reader has to know."""

    name: str
    title: str
    numbers: pd.DataFrame
    cells: pd.DataFrame
    notes: tuple[str, ...] = ()


def write_table(table: Table, out: Path) -> None:
    """Write `<name>.csv`, `.md` and `.tex` under `out`."""
    write_atomic(out / f"{table.name}.csv", to_csv(table.numbers))
    write_atomic(out / f"{table.name}.md", to_markdown(table))
    write_atomic(out / f"{table.name}.tex", to_latex(table))


def to_markdown(table: Table) -> str:
    """Title, pipe table and notes; aligned, so that it reads well in a terminal too."""
    notes = "".join(f"{note}\n" for note in table.notes)
    return f"**{table.title}**\n\n{_render(table.cells, 'pipe')}\n\n{notes}"


def to_latex(table: Table) -> str:
    """A table environment with booktabs rules."""
    notes = "".join(f"\\par\\footnotesize {_escape(note)}\n" for note in table.notes)
    body = _render(table.cells, "latex_booktabs").replace("±", "$\\pm$")
    caption = f"\\caption{{{_escape(table.title)}}}\n\\label{{tab:{table.name}}}"
    return f"\\begin{{table}}\n\\centering\n{caption}\n{body}\n{notes}\\end{{table}}\n"


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


def _render(cells: pd.DataFrame, style: str) -> str:
    alignment = ["left" if column in TEXT_COLUMNS else "right" for column in cells] if len(cells) else None
    return tabulate(cells, list(cells), style, showindex=False, disable_numparse=True, colalign=alignment)


def _escape(text: str) -> str:
    for character in "&%$#_":
        text = text.replace(character, f"\\{character}")
    return text.replace("±", "$\\pm$")
