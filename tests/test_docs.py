"""What the docs say exists: links, files, commands and targets; CONTRIBUTING's benchmark, in a copy of the package."""

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dualspeed.cli import make_parser
from tests.support.paths import REPOSITORY

PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("config/**/*.md")])
# Folders whose files the docs name; what lies under results/ and data/ appears in a run.
TRACKED = "benchmarks|config|docs|dualspeed|profiles|tests|workflow"
EXAMPLES = ("<", "*", "{", "brightest", "counting")


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
def test_named_files_exist(text, folder):
    for path in re.findall(rf"`((?:{TRACKED})/[^`\s:]+)`", text):
        if not any(part in path for part in EXAMPLES):
            assert (REPOSITORY / path).exists() or (folder / path).exists(), path


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


def test_a_new_benchmark_takes_one_file_and_its_lines(tmp_path):
    file = re.search(
        r"```python\n(\"\"\"Counting.*?)```", (REPOSITORY / "CONTRIBUTING.md").read_text(), flags=re.DOTALL
    )[1]
    package = shutil.copytree(REPOSITORY / "dualspeed", tmp_path / "dualspeed")
    (package / "benchmarks" / "counting.py").write_text(file)
    for path, line, new in [
        (
            "benchmarks/__init__.py",
            "_SCORED_HERE = (",
            "from dualspeed.benchmarks.counting import COUNTING\n\n_SCORED_HERE = (",
        ),
        ("benchmarks/__init__.py", "_SCORED_HERE = (GQA", "_SCORED_HERE = (COUNTING, GQA"),
        ("config.py", "BENCHMARK_NAMES = (\n", 'BENCHMARK_NAMES = (\n    "counting",\n'),
        ("labels.py", "BENCHMARK_LABELS = {\n", 'BENCHMARK_LABELS = {\n    "counting": "Counting",\n'),
    ]:
        text = (package / path).read_text()
        assert line in text
        (package / path).write_text(text.replace(line, new, 1))
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
