"""Projects in folders with awkward names: blanks, `#`, quotes, `$`, umlauts, apostrophes, hundreds of characters."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from dualspeed.errors import ConfigError
from dualspeed.settings.project import load_project
from measurements.same_tables import compare
from tests.support.paths import REPOSITORY
from tests.support.workflow import copy_project, edit_config, shrunk_project, snakemake

FOLDER = "pr\u00f6ject #1 of Bob's"
RESULTS = 'res "x" $HOME \u00fc\'s #1; *&'
LONG = "/".join(["n" * 200] * 5)
UNQUOTED = {"params.options", "params.parent", "resources.gpu", "resources.runtime", "threads"}
"""Placeholders that stand in a command as they are: numbers, and options that the rules quote themselves."""
OPTIONS = {"resources.launch", "resources.share"}
RULES = sorted((REPOSITORY / "workflow/rules").glob("*.smk"))


def move_results(results: str):
    """An edit of config.yaml that puts results into another folder, and all that is in it with them."""

    def moved(value):
        if isinstance(value, dict):
            return {key: moved(item) for key, item in value.items()}
        is_inside = isinstance(value, str) and (value == "results" or value.startswith("results/"))
        return results + value.removeprefix("results") if is_inside else value

    return edit_config(lambda content: content.update(moved(content | {"results": "results"})))


def shell_blocks() -> list[tuple[str, str]]:
    """(file, text) of the shell command of each rule."""
    blocks = []
    for path in RULES:
        parts = re.split(r"^    shell:\n", path.read_text(), flags=re.MULTILINE)[1:]
        blocks += [(path.name, part.split("\n\n\n")[0]) for part in parts]
    return blocks


def test_every_path_in_every_command_is_quoted():
    blocks = shell_blocks()
    assert len(blocks) == 17
    for file, block in blocks:
        for name, how in re.findall(r"(?<!\{)\{([\w.]+)(:q)?\}(?!\})", block):
            assert how or name in UNQUOTED | OPTIONS, f"{file}: {{{name}}}"


@pytest.mark.parametrize("results", [RESULTS, pytest.param(LONG, marks=pytest.mark.slow)], ids=["awkward", "long"])
def test_a_dry_run_of_the_whole_workflow_prints_commands_that_a_shell_takes_apart_rightly(tmp_path, results):
    project = tmp_path / FOLDER
    project.mkdir()
    copy_project(project)
    move_results(results)(project)
    output = snakemake(project, "-n", "-p", "--config", "experiments=config/demo/experiments-full.tsv")
    assert "This was a dry-run" in output, output[-3000:]
    commands = re.findall(r"^Shell command: ((?:exec )?dualspeed .*)$", output, flags=re.MULTILINE)
    assert len(commands) > 50
    for command in commands:
        words = shlex.split(command)
        for name, word in pairwise(words):
            if name in ("--out", "--state", "--settings", "--data", "--model", ">") and word != "2>&1":
                assert word.startswith(f"{results}/"), (name, command)
    assert sorted(path.name for path in project.iterdir()) == sorted(
        ["Snakefile", "workflow", "profiles", "config", ".snakemake", Path(results).parts[0]]
    )


@pytest.mark.slow
def test_a_shrunk_run_in_such_a_folder_gives_the_tables_of_a_run_elsewhere(tmp_path):
    tables = {}
    for folder, results in (("plain", "results"), (FOLDER, RESULTS)):
        project = tmp_path / folder
        project.mkdir()
        shrunk_project(project)
        before = {path.name for path in project.iterdir()}
        if results != "results":
            move_results(results)(project)
        output = snakemake(project, "--cores", "2")
        assert "(100%) done" in output, output[-4000:]
        assert (project / results / "report.html").stat().st_size > 10_000
        made = {path.name for path in project.iterdir()} - before
        assert made == {".snakemake", results, "results"}  # no stray file; the store stays in results/
        log = next((project / results / "logs/tables").glob("*.log")).read_text()
        assert "took nothing" not in log, log
        assert list((project / "results/mlartifacts").rglob("table1.md")), "artifacts of MLflow are elsewhere"
        assert "Nothing to be done" in snakemake(project, "-n")
        tables[folder] = project / results / "tables/demo"
    files = sorted([*tables["plain"].glob("*.csv"), *tables["plain"].glob("*.md")])
    differences, num_cells = [], 0
    for file in files:
        found, compared = compare(file, tables[FOLDER] / file.name)
        differences += found
        num_cells += compared
    assert differences == [] and len(files) > 8 and num_cells > 100


def load(**changes):
    content = yaml.safe_load((REPOSITORY / "config/demo/config.yaml").read_text())
    sheet = {"experiments": str(REPOSITORY / "config/demo/experiments.tsv")}
    return load_project(content | sheet | changes, "config.yaml")


@pytest.mark.parametrize(
    "results, message",
    [
        (
            "res{ults}",
            "config.yaml: results: 'res{ults}' has a brace, which Snakemake takes for a wildcard; valid: none",
        ),
        ("", "config.yaml: results: '' is no folder's name; valid: a path in one line"),
        (" ", "config.yaml: results: ' ' is no folder's name"),
        ("a\nb", r"config.yaml: results: 'a\nb' is no folder's name"),
        ("~/results", "config.yaml: results: '~/results': only shells know '~'; valid: the path from /"),
        ("n" * 256, "bytes from / on); valid: at most 255 bytes for each folder, 3000 from / on"),
        ("/".join(["n" * 200] * 16), "bytes from / on); valid: at most 255 bytes for each folder, 3000 from / on"),
    ],
)
def test_a_results_folder_that_cannot_be_one_is_refused(results, message):
    with pytest.raises(ConfigError) as raised:
        load(results=results)
    assert message in str(raised.value) and len(str(raised.value)) < 600


def test_a_benchmarks_folder_with_braces_and_a_sheet_that_names_no_folder_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"benchmarks\.gqa\.folder: .\{x\}. has a brace"):
        load(benchmarks={"gqa": {"folder": "{x}"}})
    sheet = tmp_path / "experiments (1).tsv"
    sheet.write_text((REPOSITORY / "config/demo/experiments.tsv").read_text())
    with pytest.raises(ConfigError, match=r"experiments: 'demo- \(1\)' cannot name a folder"):
        load(experiments=str(sheet))
