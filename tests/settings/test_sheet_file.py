"""Sheets as people and spreadsheets leave them: read as they are meant, or refused in one sentence."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dualspeed.errors import ConfigError
from dualspeed.settings.project import load_project
from dualspeed.settings.sheet_file import read_sheet
from dualspeed.settings.yaml_file import read_yaml
from tests.support.paths import REPOSITORY

CONFIG = yaml.safe_load((REPOSITORY / "config/demo/config.yaml").read_text())
SHEET = (REPOSITORY / "config/demo/experiments.tsv").read_text()
COLUMNS = SHEET.splitlines()[0]
ROW = "a\ttiny\tdualspeed\tdivprune\t0.9\t0.2\t4\t0.5\t3\ttable1"


def write(folder: Path, content: str | bytes) -> Path:
    sheet = folder / "experiments.tsv"
    sheet.write_bytes(content if isinstance(content, bytes) else content.encode())
    return sheet


def refusal(folder: Path, content: str | bytes) -> str:
    """Sentence that refuses a sheet, without the name of its file."""
    sheet = write(folder, content)
    with pytest.raises(ConfigError) as raised:
        load_project(CONFIG | {"experiments": str(sheet)}, "config.yaml")
    message = str(raised.value)
    assert message.startswith(str(sheet)) and "\n" not in message
    return message.removeprefix(str(sheet))


def command(sheet: Path) -> subprocess.CompletedProcess:
    """`dualspeed compare` on a sheet."""
    words = ["compare", "a", "b", "--experiments", str(sheet)]
    return subprocess.run(
        [sys.executable, "-m", "dualspeed.cli", *words], cwd=REPOSITORY, capture_output=True, text=True
    )


def test_a_copied_row_with_another_id_names_both_rows(tmp_path):
    """Its seed is the same, so it would count as a second seed that differs in nothing."""
    sheet = write(tmp_path, f"{COLUMNS}\n{ROW}\n{ROW.replace('a', 'b', 1).replace('table1', 'table2')}\n")
    done = command(sheet)
    assert done.returncode == 1
    assert done.stderr.startswith(f"dualspeed compare: {sheet}: row b: trains the same as row a, every setting and the")
    assert done.stderr.count("\n") == 1


def test_settings_that_are_equal_in_other_words_are_a_copy(tmp_path):
    rows = "a\ttiny\tdualspeed\t\t\t\t\t\t\t\nb\ttiny\tdualspeed\tdivprune\t.90\t0.1\t4\t1\t0\t\n"
    assert ": row b: trains the same as row a" in refusal(tmp_path, f"{COLUMNS}\n{rows}")


def test_rows_that_differ_in_seed_or_method_alone_are_no_copies(tmp_path):
    rows = "a\ttiny\tbaseline\t\t\t\t\t\t0\t\nb\ttiny\tbaseline\t\t\t\t\t\t1\t\nc\ttiny\tdualspeed\t\t\t1\t0\t0\t0\t\n"
    sheet = write(tmp_path, f"{COLUMNS}\n{rows}")
    assert len(load_project(CONFIG | {"experiments": str(sheet)}, "config.yaml").rows) == 3


@pytest.mark.parametrize(
    "row, message",
    [
        # The tab before an empty distillation_weight: the seed would have been taken for it.
        (
            "a\ttiny\tdualspeed\tdivprune\t0.9\t0.2\t4\t3\ttable1",
            "a tab is lost or too many before seed: 'table1' is no",
        ),
        ("a\ttiny\tdualspeed\tdivprune\t0.9\t0.2\t4\t3\t", "row a: 9 cells; valid: 10, one per column, empty ones too"),
        ("a\ttiny\tdualspeed\tdivprune\t0.9\t0.2\t4\t3\t", "(none for tables)"),
        ("a\ttiny\tdualspeed", "row a: 3 cells; valid: 10, one per column, empty ones too (none for pruner)"),
        ("a\ttiny\tdualspeed\t0.9\t0.2\t4\t0.5\t3\ttable1", "before num_virtual_tokens: '0.5' is no int"),
        (f"{ROW}\ttable2", "row a: 11 cells; valid: 10, one per column, empty ones too (behind tables)"),
        (f"{ROW}\t", "row a: 11 cells; valid: 10"),
        ("a\ttiny\t\tdualspeed\tdivprune\t0.9\t0.2\t4\t0.5\t3\ttable1", "before pruning_ratio: 'divprune' is no float"),
        # As many cells as columns, in the wrong ones.
        ("a\ttiny\tdualspeed\t0.9\tdivprune\t0.2\t4\t0.5\t3\ttable1", "row a: pruning_ratio: 'divprune' is no float"),
        ("a\ttiny\tdualspeed\t0.9\t\t0.2\t4\t0.5\t3\ttable1", "row a: pruner: '0.9' is unknown"),
        ("a\ttiny\tdualspeed\t\t\t0.2\t0.5\t4\t3\ttable1", "row a: num_virtual_tokens: '0.5' is no int"),
        ("a\ttiny\tdualspeed\t\t\t\t\t\ttable1\t3", "row a: seed: 'table1' is no int; valid: int, or empty"),
        ("a\ttiny\tdualspeed\t\t\t\t\t\t\t3", "row a: tables: '3' is unknown"),
        ("tiny\ta\tdualspeed\t\t\t\t\t\t\t", "row tiny: model: 'a' is unknown"),
        # Numbers of spreadsheets.
        (ROW.replace("0.9", "0,9"), "row a: pruning_ratio: '0,9' is no float (write 0.9); valid: float, or empty"),
        (ROW.replace("0.9", "90 %"), "row a: pruning_ratio: '90 %' is no float; valid: float, or empty"),
        (ROW.replace("\t4\t", "\t4.0\t"), "row a: num_virtual_tokens: '4.0' is no int; valid"),
        (ROW.replace("\t4\t", "\t1_0\t"), "row a: num_virtual_tokens: '1_0' is no int; valid"),
        (ROW.replace("\t4\t", "\t\u0664\t"), "row a: num_virtual_tokens: '\u0664' is no int; valid"),
        (ROW.replace("\t3\t", "\t4294967296\t"), "row a: seed: 4294967296 is out of range; valid: 0 or more, at most"),
        (ROW.replace("\t3\t", f"\t{'9' * 5000}\t"), "is no int; valid: int, or empty"),
        (f"{'a' * 101}{ROW[1:]}", "has 101 characters; valid: at most 100"),
        # Quotes.
        (
            ROW.replace("divprune", '"divprune'),
            ", line 2: quotes that don't match (unexpected end of data); valid: each",
        ),
        (ROW.replace("divprune", '"div"prune'), ", line 2: quotes that don't match"),
        (ROW.replace("table1", '"table1\ntable2"'), ", line 2: quotes that don't match"),
    ],
)
def test_a_row_that_says_something_else_than_it_seems_names_row_and_column(tmp_path, row, message):
    found = refusal(tmp_path, f"{COLUMNS}\n{row}\nb\ttiny\tbaseline\t\t\t\t\t\t\t\n")
    assert message in found
    assert len(found) < 400


AS_EXPORTED = {
    "quotes": "\n".join("\t".join(f'"{cell}"' for cell in line.split("\t")) for line in SHEET.splitlines()),
    "blanks": "\n".join("\t".join(f" {cell}\u00a0" for cell in line.split("\t")) for line in SHEET.splitlines()),
    "byte order mark": f"\ufeff{SHEET}",
    "CRLF": SHEET.replace("\n", "\r\n"),
    "CR": SHEET.replace("\n", "\r"),
    "empty lines": f"\n\t\t\t\n{SHEET}".replace("\n", "\n\n  \n\t\t\t\t\t\t\t\t\t\n"),
    "quoted empty lines": SHEET.replace("\n", '\n""\t""\n'),
    "comments": f'# the "main rows\n{SHEET}'.replace("\n", '\n  # 5" wide\n"# quoted"\t\t\n'),
    "no line end": SHEET.rstrip("\n"),
    "byte order mark, quotes, CRLF": "\ufeff"
    + SHEET.replace("baseline-seed0", '"baseline-seed0"').replace("\n", "\r\n"),
}


@pytest.mark.parametrize("form", AS_EXPORTED)
def test_a_sheet_as_spreadsheets_and_editors_write_it_is_the_same_sheet(tmp_path, form):
    assert read_sheet(write(tmp_path, AS_EXPORTED[form])) == read_sheet(write(tmp_path, SHEET))


@pytest.mark.parametrize(
    "content, message",
    [
        (SHEET.replace("\tmethod\t", "\tmodel\t", 1), ": column 'model' is there twice; valid: each column once"),
        (SHEET.replace("\tmethod\t", '\t" model "\t', 1), ": column 'model' is there twice"),
        (SHEET.replace("\tseed\t", "\t\t", 1), ": column 9 has no name; valid: id, model"),
        (SHEET.replace("\n", "\t\n", 1), ": column 11 has no name; valid: id, model"),
        (SHEET.replace("\t", ";"), "is unknown; valid: id, model, method"),
        (SHEET.replace("\tseed\t", "\tSeed\t", 1), ": column 'Seed' is unknown (did you mean 'seed'?)"),
        (SHEET.encode("utf-16"), ": not readable as text ("),
        (SHEET.replace("baseline-seed0", "b\u00e4seline").encode("latin-1"), ": not readable as text ("),
        (SHEET.replace("baseline-seed0", "b\0"), ": row b\0: id: 'b\\x00' cannot name a folder"),
        (SHEET.replace("baseline-seed0", ""), ": id: empty; valid: a value in every row"),
    ],
)
def test_a_sheet_of_another_form_is_refused(tmp_path, content, message):
    assert message in refusal(tmp_path, content)


def test_a_quote_that_is_never_closed_swallows_no_row(tmp_path):
    """Read by the rule of CSV files, it would end at the end of the file, and the rows behind it were gone."""
    sheet = SHEET.replace("\t0\ttable1,table2,table3,figure4,figure5\nnaive", '\t0\t"table1\nnaive')
    assert ", line 2: quotes that don't match" in refusal(tmp_path, sheet)


YAML_ERRORS = {
    "name: x\ntracking: [\n": (3, 1, "expected the node content"),
    "name: x\n  model: y\n": (2, 8, "mapping values are not allowed here"),
    "name: x\nmodels:\n\ttiny: 1\n": (3, 1, "cannot start any token"),
    "name: 'x\n": (2, 1, "found unexpected end of stream"),
    "name: x\nresults: a\nname: y\n": (3, 1, "the key 'name' is there twice"),
    "models:\n  a: {source: demo, source: x}\n": (2, 21, "the key 'source' is there twice"),
    "name: 2001-13-01\n": (1, 7, "is no timestamp: month must be in 1..12"),
    "name: x\nexperiments: *no\n": (2, 14, "found undefined alias 'no'"),
    "name: !!python/object:os.x {}\n": (1, 7, "could not determine a constructor"),
    "name: x\nresults: \x07\n": (2, 10, r"the character '\x07' is not allowed"),
    'name: "\\ud800"\n': (1, 7, "a character that no name and no path can hold"),
    'name: "a\\0"\n': (1, 7, "a character that no name and no path can hold"),
    "? [a]\n: 1\n": (1, 3, "found unhashable key"),
    "name: " + "[" * 5000: (1, 1, "nested too deeply"),
    "name: x\n--- \nname: y\n": (2, 1, "but found another document"),
    f"name: {'9' * 5000}\n": (1, 7, "is no int: Exceeds the limit"),
}


@pytest.mark.parametrize("text", YAML_ERRORS, ids=lambda text: text[:20])
def test_a_broken_yaml_names_file_line_and_column(tmp_path, text):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    line, column, problem = YAML_ERRORS[text]
    with pytest.raises(ConfigError) as raised:
        read_yaml(file)
    message = str(raised.value)
    assert message.startswith(f"{file}, line {line}: not valid YAML at column {column} (")
    assert problem in message and "\n" not in message and len(message) < 400


def test_the_command_says_so_in_one_line(tmp_path):
    (tmp_path / "config.yaml").write_text("name: x\n  model: y\n")
    words = ["plan", "--config", str(tmp_path / "config.yaml")]
    done = subprocess.run([sys.executable, "-m", "dualspeed.cli", *words], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "config.yaml, line 2: not valid YAML at column 8 (mapping values are not allowed here)" in done.stderr


@pytest.mark.parametrize("value", ["a\0b", "a\ud800"])
def test_a_text_that_is_none_is_refused_wherever_the_configuration_comes_from(value):
    with pytest.raises(ConfigError, match=r"config: results: .* holds a character that no name and no path can"):
        load_project(CONFIG | {"experiments": str(REPOSITORY / "config/demo/experiments.tsv"), "results": value})


def test_a_path_that_is_too_long_for_a_file_is_none():
    with pytest.raises(ConfigError, match=r"nnn: no such file; valid: a tab-separated sheet of experiments"):
        load_project(CONFIG | {"experiments": "n" * 5000}, "config.yaml")


def test_names_of_models_are_text():
    models = CONFIG["models"] | {1: CONFIG["models"]["tiny"]}
    content = CONFIG | {"experiments": str(REPOSITORY / "config/demo/experiments.tsv"), "models": models}
    with pytest.raises(ConfigError, match=r"config\.yaml: models: key 1 is of type int; valid: str, in quotes"):
        load_project(content, "config.yaml")
