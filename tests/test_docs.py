"""Names in the docs exist: links, paths, modules, commands, targets; CONTRIBUTING's benchmark runs as it stands."""

import argparse
import ast
import json
import re
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from dualspeed.cli import make_parser
from dualspeed.layout import METHOD_FILE
from tests.support.paths import REPOSITORY

FOLDERS = ("config", "docs", "dualspeed", "measurements", "profiles", "tests", "workflow")
PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("results/*.md")]) + sorted(
    page for folder in FOLDERS for page in (REPOSITORY / folder).rglob("*.md")
)
# Folders whose files the docs name; files under results/ and data/ appear in a run.
TRACKED = "|".join(FOLDERS)
EXAMPLES = ("<", "*", "{", "NAME", "brightest", "counting")


def pages(text_of=lambda page: page.read_text()):
    return [pytest.param(text_of(page), page.parent, id=str(page.relative_to(REPOSITORY))) for page in PAGES]


def anchors(page: Path) -> set[str]:
    """Names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def code(text: str) -> str:
    """Blocks and spans of code, where commands stand; none of Python."""
    text = re.sub(r"```python\n.*?```", "", text, flags=re.DOTALL)
    blocks = re.findall(r"```[a-z]*\n(.*?)```", text, flags=re.DOTALL)
    indented = re.findall(r"^    .*$", text, flags=re.MULTILINE)
    return "\n".join([*blocks, *indented, *re.findall(r"`([^`\n]+)`", text)])


def without_moves(text: str) -> str:
    """A page without the first column of CHANGELOG's table of moves, which names modules that are gone."""
    moves = re.search(r"^\| before \| now \|\n(?:\|.*\n)+", text, flags=re.MULTILINE)
    return text.replace(moves[0], re.sub(r"^\|[^|\n]*\|", "|", moves[0], flags=re.MULTILINE)) if moves else text


def missing_paths(text: str, folder: Path) -> list[str]:
    """Paths of the repository that a text names, in code or in prose, and that don't exist."""
    paths = re.findall(rf"(?<![\w/.-])(?:{TRACKED})/[\w./*<>{{}}-]*", text)
    paths = [path.rstrip(".") for path in paths if not any(part in path for part in EXAMPLES)]
    return [path for path in paths if not (REPOSITORY / path).exists() and not (folder / path).exists()]


def missing_modules(text: str) -> list[str]:
    """Modules, and their attributes, that a text names or its examples import, and that don't exist."""
    names = re.findall(r"(?<![\w/.-])((?:dualspeed|measurements)(?:\.\w+)+)", text)
    for module, imported in re.findall(
        r"^from (dualspeed[\w.]*) import (\([^)]*\)|[\w, ]+)$", text, flags=re.MULTILINE
    ):
        names += [f"{module}.{name}" for name in re.findall(r"(?<! as )\b(?!as\b)\w+", imported)]
    names = [name for name in names if name != METHOD_FILE and not any(part in name for part in EXAMPLES)]
    return [name for name in names if not is_there(name)]


def is_there(name: str) -> bool:
    """True for the dotted name of a module, or of an attribute of a module or class."""
    found = import_module(name.partition(".")[0])
    for end in range(2, name.count(".") + 2):
        path = ".".join(name.split(".")[:end])
        part = path.rpartition(".")[2]
        if hasattr(found, part):
            found = getattr(found, part)
        elif hasattr(found, "__path__") and find_spec(path):
            found = import_module(path)
        else:
            return False
    return True


@pytest.mark.parametrize("text, folder", pages())
def test_links_lead_somewhere(text, folder):
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (folder / path).resolve() if path else None
        assert target is None or target.exists(), link
        if anchor and target:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("text, folder", pages())
def test_named_paths_exist(text, folder):
    assert missing_paths(without_moves(text), folder) == []


@pytest.mark.parametrize("text, folder", pages())
def test_named_modules_exist(text, folder):
    assert missing_modules(without_moves(text)) == []


def test_the_readme_shows_every_folder_of_the_package():
    listed = set(re.findall(r"\]\((dualspeed/(?:\w+/)*)\)", (REPOSITORY / "README.md").read_text()))
    folders = {path.parent.relative_to(REPOSITORY) for path in (REPOSITORY / "dualspeed").rglob("*.py")}
    assert listed == {f"{folder}/" for folder in folders if folder.name != "figures"}


def test_the_table_of_imports_is_the_one_that_is_tested():
    tree = ast.parse((REPOSITORY / "tests" / "test_imports.py").read_text())
    assigned = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        if hasattr(node.targets[0], "id")
    }
    table = assigned["MAY_IMPORT"]
    tested = {key.value: {*ast.literal_eval(value)} for key, value in zip(table.keys, table.values, strict=True) if key}
    rows = (REPOSITORY / "CONTRIBUTING.md").read_text().partition("| folder | may import |\n|---|---|\n")[2]
    told = {}
    for row in rows.partition("\n\n")[0].splitlines():
        folders, allowed = (re.findall(r"`(\w+)`", cell) for cell in row.strip("|").split("|"))
        told |= {folder: set(allowed) for folder in folders}
    assert told == tested


def test_a_name_of_nothing_is_found():
    text = "`dualspeed/cli.py`, see dualspeed/modeling.py, `tests/gone.py` and [here](../docs/gone.md); results/gone"
    assert missing_paths(text, REPOSITORY) == ["dualspeed/modeling.py", "tests/gone.py"]
    text = (
        "`dualspeed.cli.main`, `dualspeed.cli.gone`, dualspeed.modeling; `python -m measurements.gone`; dualspeed.json"
    )
    example = "```python\nfrom dualspeed.settings import names, gone\nfrom dualspeed import Mode, Gone\n```"
    assert missing_modules(text) == ["dualspeed.cli.gone", "dualspeed.modeling", "measurements.gone"]
    assert missing_modules(example)[-2:] == ["dualspeed.settings.gone", "dualspeed.Gone"]
    assert without_moves("a\n\n| before | now |\n|---|---|\n| `dualspeed.gone` | x |\n").count("gone") == 0


@pytest.mark.parametrize("text, folder", pages())
def test_named_commands_exist(text, folder):
    commands = next(action for action in make_parser()._actions if isinstance(action, argparse._SubParsersAction))
    for name in re.findall(r"(?:^|[`/\s])dualspeed ([a-z][a-z-]*)", code(text)):
        assert name in commands.choices, f"dualspeed {name}"


@pytest.mark.parametrize("text, folder", pages())
def test_named_make_targets_exist(text, folder):
    targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE)
    for name in re.findall(r"(?:^|\s)make ([a-z-]+)", code(text), flags=re.MULTILINE):
        assert name in targets, f"make {name}"


@pytest.mark.parametrize("text, folder", pages())
def test_named_rules_exist(text, folder):
    sources = "".join(path.read_text() for path in REPOSITORY.glob("workflow/rules/*.smk"))
    rules = re.findall(r"^rule (\w+):", sources, flags=re.MULTILINE)
    for name in re.findall(r"snakemake(?: --configfile \S+)? ([a-z_]+)\b(?!/)", code(text)):
        assert name in rules, f"snakemake {name}"


def example(opening: str) -> str:
    """Python block of CONTRIBUTING that starts with `opening`."""
    return re.search(rf"```python\n({opening}.*?)```", (REPOSITORY / "CONTRIBUTING.md").read_text(), flags=re.DOTALL)[1]


def copy_with(tmp_path: Path, file: str, content: str, table: str, line: str) -> None:
    """Copy the package, with one more file, and with one more line at the start of a table in settings/names.py."""
    package = shutil.copytree(REPOSITORY / "dualspeed", tmp_path / "dualspeed")
    (package / file).write_text(content)
    names = package / "settings" / "names.py"
    assert f"{table} = {{\n" in names.read_text()
    names.write_text(names.read_text().replace(f"{table} = {{\n", f"{table} = {{\n{line}", 1))


def test_a_new_pruner_takes_one_file_and_one_line(tmp_path):
    line = example('    "brightest"')
    copy_with(tmp_path, "pruners/brightest.py", example('"""Brightest'), "PRUNER_LABELS", line)
    code = """
import torch
from dualspeed import DualSpeedConfig
from dualspeed.pruners import VisualTokens, get_pruner
features = torch.tensor([[[1.0], [3.0], [2.0], [0.0]]])
tokens = VisualTokens(features=features, mask=torch.ones(1, 4, dtype=torch.bool))
print(get_pruner(DualSpeedConfig(pruner="brightest").pruner)(tokens, torch.tensor([2])).tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "[[1, 2]]\n", done.stderr


def test_a_new_benchmark_takes_one_file_and_its_line(tmp_path):
    line = example('    "counting"')
    copy_with(tmp_path, "benchmarks/counting.py", example('"""Counting'), "BENCHMARK_TABLE", line)
    (tmp_path / "schemas").mkdir()
    subprocess.run([sys.executable, "-m", "dualspeed.settings.schema", "schemas"], cwd=tmp_path, check=True)
    assert "- counting\n" in (tmp_path / "schemas" / "config.schema.yaml").read_text()
    questions = [{"question_id": i, "image": "0.png", "text": "how many ?", "answer": str(i)} for i in range(4)]
    answers = [{"question_id": i, "prompt": "how many ?", "text": text} for i, text in enumerate(["0", " 1 ", "one"])]
    for name, lines in (("counting", questions), ("answers", answers)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--data", ".", "--answers", "answers.jsonl", "--out", "metrics.json"]
    command = [sys.executable, "-m", "dualspeed.cli", "score", "counting", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    scored = json.loads((tmp_path / "metrics.json").read_text())
    assert (scored["score"], scored["num_questions"], scored["num_missing"]) == (50, 4, 1)
