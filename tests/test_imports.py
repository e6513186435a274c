"""Imports of the package go one way: each room imports only what the table below allows."""

import ast
import shutil
from pathlib import Path

import pytest

from tests.support.imports import arrows, longest_path, rooms
from tests.support.paths import REPOSITORY

ROOT = ("batch", "device", "environment", "errors", "files", "fingerprints", "layout", "programs")
# room -> the rooms that it may import, beside ROOT
MAY_IMPORT = {
    **{room: () for room in ROOT},
    "chat_templates": (),
    "cluster": (),
    "tracking": (),
    "settings": ("chat_templates",),
    "benchmarks": ("settings",),
    "pruners": ("settings",),
    "data": ("settings", "chat_templates"),
    "base_models": ("settings", "chat_templates"),
    "plan": ("settings",),
    "method": ("settings", "pruners"),
    "training": ("cluster", "settings", "chat_templates", "tracking", "data", "method"),
    "evaluation": ("settings", "tracking", "benchmarks", "data", "method"),
    "reporting": ("settings", "tracking", "benchmarks", "evaluation"),
    "demo": ("settings", "chat_templates", "data", "base_models", "method"),
    "trl": ("training",),
}
# file -> further rooms: it draws what pruners keep of a picture, with a model
EXCEPTIONS = {"dualspeed/reporting/figures/kept_tokens.py": ("pruners", "data", "method")}
MAX_ROOMS, MAX_FLOORS = 30, 8
MAX_MODULE, MAX_FUNCTION = 350, 60


def forbidden(root: Path) -> list[str]:
    """Every import that the table doesn't allow, as "file:line imports room"."""
    wrong = []
    for (room, target), places in arrows(root).items():
        # Root modules may import each other, but not in a circle (below).
        allowed = (*MAY_IMPORT[room], *ROOT)
        for place in places:
            if target not in allowed and target not in EXCEPTIONS.get(place.partition(":")[0], ()):
                wrong.append(f"{place} imports {target}")
    return wrong


def test_every_import_goes_the_way_of_the_table():
    assert forbidden(REPOSITORY) == []


def test_every_room_is_in_the_table():
    assert set(rooms(REPOSITORY)) == {*MAY_IMPORT, "__init__", "cli"}


def test_the_package_is_small_enough_to_see():
    path = longest_path(set(arrows(REPOSITORY)))
    assert len(rooms(REPOSITORY)) <= MAX_ROOMS
    assert len(path) <= MAX_FLOORS, path


@pytest.mark.parametrize(
    "line",
    [
        "import dualspeed.method",
        "from dualspeed import method",
        "from dualspeed.method.model import DualSpeedModel",
        "from ..method import model",
        "if TYPE_CHECKING:\n    from dualspeed.method.model import DualSpeedModel",
        "def f():\n    from dualspeed.method import model",
        'import_module("dualspeed.method.model")',
        'importlib.import_module(f"dualspeed.method.{name}")',
    ],
)
def test_a_planted_arrow_is_found(line, tmp_path):
    copy = tmp_path / "dualspeed"
    shutil.copytree(REPOSITORY / "dualspeed", copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "settings" / "planted.py").write_text(f"{line}\n")
    assert [place.rpartition(":")[0] for place in forbidden(tmp_path)] == ["dualspeed/settings/planted.py"]


def test_a_circle_is_found():
    with pytest.raises(ValueError, match="a -> b -> a"):
        longest_path({("a", "b"), ("b", "a")})


def test_settings_benchmarks_and_plan_import_no_heavy_library():
    heavy = {"settings": {"torch", "numpy", "pandas", "transformers"}, "benchmarks": {"torch"}, "plan": {"torch"}}
    for room, libraries in heavy.items():
        for path in (REPOSITORY / "dualspeed" / room).rglob("*.py"):
            assert not libraries & imported_libraries(path), path


def imported_libraries(path: Path) -> set[str]:
    """First part of the name of everything that a file imports, at every depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


def test_modules_and_functions_are_short():
    for path in (REPOSITORY / "dualspeed").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= MAX_MODULE, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < MAX_FUNCTION, f"{path}: {node.name}"


def test_no_two_modules_share_a_name_on_the_path():
    tests = [path.name for path in (REPOSITORY / "tests").rglob("test_*.py")]
    assert len(set(tests)) == len(tests)


def test_test_modules_import_no_test_module():
    for path in (REPOSITORY / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert not node.module.rpartition(".")[2].startswith("test_"), path
