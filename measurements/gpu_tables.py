"""Tables of docs/speed.md from the JSON of measurements/gpu.py.

    python -m measurements.gpu_tables [measurements/gpu.json] [--page docs/speed.md]

Everything between the page's marks is written anew. Without the JSON each cell says that it was not measured yet. A
cell without a figure holds a letter, and the reasons stand below the table.
"""

import argparse
import json
import string
from pathlib import Path
from typing import Any

from measurements.gpu import PARTS
from measurements.gpu_cells import Part

START, END = "<!-- gpu:start -->", "<!-- gpu:end -->"
UNMEASURED = "not measured yet"


def main() -> None:
    """Write the tables into the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("json", type=Path, nargs="?", default=Path("measurements/gpu.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/speed.md"))
    options = parser.parse_args()
    measured = json.loads(options.json.read_text()) if options.json.exists() else None
    options.page.write_text(with_tables(options.page.read_text(), measured))


def with_tables(page: str, measured: dict[str, Any] | None) -> str:
    """Page with the tables of a measurement, or of none, between its marks."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{tables(measured)}\n{END}{after}"


def tables(measured: dict[str, Any] | None) -> str:
    """All tables, with the machine above them."""
    blocks = [headline(measured)]
    for part in PARTS:
        rows = (measured or {"parts": {}})["parts"].get(part.name, {})
        blocks += [f"### {part.title}", *([part.note] if part.note else []), table(part, rows)]
    return "\n\n".join(blocks)


def headline(measured: dict[str, Any] | None) -> str:
    """Sentence on the machine."""
    if measured is None:
        return f"On a GPU: {UNMEASURED}."
    machine = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in measured["machine"].items() if value)
    sentences = [f"`make gpu` took {measured['seconds']:.0f} s on this machine: {machine}.", *measured["shortcomings"]]
    return " ".join(["Toy sizes, whose figures mean nothing."] * measured["is_toy"] + sentences)


def table(part: Part, rows: dict[str, dict[str, Any]]) -> str:
    """Markdown table of a part, and the reasons of its cells without a figure."""
    reasons: list[str] = []
    lines = [["", *part.columns], ["---"] + ["--:"] * len(part.columns)]
    for name in part.rows:
        cells = rows.get(name, {})
        lines.append([name, *(shown(cells.get(column), reasons) for column in part.columns)])
    notes = [f"({letter(index)}) {reason}." for index, reason in enumerate(reasons)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + ("\n\n" + " ".join(notes) if notes else "")


def shown(cell: Any, reasons: list[str]) -> str:
    """Text of a cell; a reason that is new is added to `reasons`."""
    if cell is None:
        return UNMEASURED
    if isinstance(cell, str):
        return cell
    if isinstance(cell, dict):
        if cell["reason"] not in reasons:
            reasons.append(cell["reason"])
        return f"({letter(reasons.index(cell['reason']))})"
    return f"{cell:.0f}" if cell >= 100 else f"{cell:.3g}"


def letter(index: int) -> str:
    """Sign of the reason with this index: a to z, then a2 and so on."""
    round_number, place = divmod(index, 26)
    return string.ascii_lowercase[place] + (str(round_number + 1) if round_number else "")


if __name__ == "__main__":
    main()
