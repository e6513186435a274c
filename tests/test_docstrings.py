"""Wording: docstrings open with a noun phrase or a verb, and phrases that readers stumbled over stay out."""

import ast
import re
from bisect import bisect_right
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY

OPENINGS = ("What", "Whether", "Of", "Those")
# Short pieces of sentences that were replaced by the field's terms.
RIDDLES = (
    "with a gradient of 0 for",
    "turns the user's text into",
    "no patch stands behind",
    "that are in `needs` into",
    "hidden from all, and is then even",
    "question to the device",
    "`log` brings them",
    "brings them home",
    "was trained before there was that choice",
    "its share of the batch",
    "sums of half a training",
    "by their own names and no others",
    "Of everything.",
)
PYTHON = ("dualspeed", "measurements", "tests")
TEXT = (*PYTHON, "config", "docs", "profiles", "workflow")
SUFFIXES = (".jinja", ".md", ".py", ".rst", ".smk", ".toml", ".tsv", ".yaml")


def badly_opened(path: Path) -> list[int]:
    """Lines of the docstrings of a file that open with one of OPENINGS; attributes' docstrings count."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":  # Snakemake's language is no Python
        return [
            number
            for number, line in enumerate(text.splitlines(), start=1)
            if re.match(rf'\s*"""({"|".join(OPENINGS)})\b', line)
        ]
    docstrings = [
        node.value
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    return sorted(node.lineno for node in docstrings if re.match(rf"\s*({'|'.join(OPENINGS)})\b", node.value))


def riddles(path: Path) -> list[tuple[int, str]]:
    """(line, phrase) of each of RIDDLES in a file; a phrase may go on in the next line, or the next comment."""
    text = path.read_text(encoding="utf-8")
    starts = [match.end() for match in re.finditer(r"\n", text)]
    found = []
    for phrase in RIDDLES:
        pattern = r"\s+(?:#\s*)?".join(map(re.escape, phrase.split()))
        found += [(bisect_right(starts, match.start()) + 1, phrase) for match in re.finditer(pattern, text)]
    return sorted(found)


def files(folders: tuple[str, ...], suffixes: tuple[str, ...]) -> list[Path]:
    """Files below these folders, but for this test, whose phrases are the list."""
    found = [path for folder in folders for path in (REPOSITORY / folder).rglob("*") if path.suffix in suffixes]
    return sorted(path for path in found if path != Path(__file__))


def test_docstrings_open_with_a_noun_or_a_verb():
    paths = [REPOSITORY / "Snakefile", *files(PYTHON, (".py",)), *files(("workflow",), (".smk",))]
    wrong = [f"{path.relative_to(REPOSITORY)}:{line}" for path in paths for line in badly_opened(path)]
    assert not wrong, f"{len(wrong)} docstrings open with {', '.join(OPENINGS)}:\n" + "\n".join(wrong)


def test_no_riddle_is_left():
    top = [path for path in REPOSITORY.iterdir() if path.name in ("Makefile", "Snakefile") or path.suffix in SUFFIXES]
    paths = [*top, *files(TEXT, SUFFIXES), REPOSITORY / "results" / "README.md"]
    wrong = [
        f"{path.relative_to(REPOSITORY)}:{line}: {phrase}"
        for path in paths
        if path.name != "CHANGELOG.md"
        for line, phrase in riddles(path)
    ]
    assert not wrong, f"{len(wrong)} riddles are left:\n" + "\n".join(wrong)


@pytest.mark.parametrize("name, line", [("module.py", 5), ("rules.smk", 5)])
@pytest.mark.parametrize("opening", OPENINGS)
def test_a_bad_opening_is_found(opening, name, line, tmp_path):
    (tmp_path / name).write_text(f'"""Good: What."""\n\n\ndef function():\n    """{opening} is this."""\n')
    assert badly_opened(tmp_path / name) == [line]


def test_a_riddle_is_found_across_lines(tmp_path):
    (tmp_path / "module.py").write_text("# One question\n# to the device, and\n\n# sums of half a training\n")
    assert riddles(tmp_path / "module.py") == [(1, "question to the device"), (4, "sums of half a training")]
