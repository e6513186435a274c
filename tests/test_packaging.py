"""The wheel runs outside the checkout with the core dependencies alone; imports and `--help` load no heavy library."""

import re
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import distribution, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import dualspeed
from dualspeed.chat_templates import TEMPLATE_NAMES
from tests.support import tiny
from tests.support.paths import REPOSITORY
from tests.support.readme import FIRST

# Packages of the extras that no core dependency needs.
NOT_CORE = ("datasets", "matplotlib", "mlflow", "pandas", "peft", "pyarrow", "requests", "snakemake")
HEAVY = {"torch", "transformers", "mlflow", "pandas", "matplotlib", "numpy"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Wheel built from a copy, so that no build folder stays in the checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(REPOSITORY / "dualspeed", source / "dualspeed", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(out)]
    run(sys.executable, "-m", "pip", "wheel", *options, str(source))
    return next(out.glob("dualspeed-*.whl"))


def run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def core_distributions() -> set[str]:
    """Names of the distributions that dualspeed needs without its extras, theirs in turn included."""
    found, ahead = set(), ["dualspeed"]
    while ahead:
        for text in requires(ahead.pop()) or []:
            requirement = Requirement(text)
            name = re.sub(r"[-_.]+", "-", requirement.name).lower()
            if name not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
                found.add(name)
                ahead.append(name)
    return found


def link_distributions(names: set[str], site_packages: Path) -> None:
    """Link the installed files of distributions into another environment, without installing them again."""
    for name in names:
        installed = distribution(name)
        for top in {file.parts[0] for file in installed.files or []} - {"..", "__pycache__"}:
            target = site_packages / top
            if not target.exists():
                target.symlink_to(installed.locate_file(top))


@pytest.mark.slow
def test_wheel_holds_every_file_of_the_package(wheel):
    files = [
        path for path in (REPOSITORY / "dualspeed").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {path.relative_to(REPOSITORY).as_posix() for path in files} <= held
    templates = {"reporting/report.html.jinja", *(f"chat_templates/{name}.jinja" for name in TEMPLATE_NAMES)}
    assert {f"dualspeed/{name}" for name in templates} <= held


ROWS = """
from PIL import Image

def load_dataset(*names, split):
    texts = [{"user": "is there a red digit ?", "assistant": "yes"}, {"user": "how many ?", "assistant": "2"}]
    return [{"images": [Image.new("RGB", (28, 28), (40 * n, 0, 0))], "texts": texts} for n in range(3)]
"""
"""Stands in for `datasets`, which the library alone doesn't need."""


@pytest.mark.slow
def test_wheel_and_core_dependencies_run_the_readme(wheel, tmp_path):
    tiny.make_llava(tmp_path / "base")
    (tmp_path / "rows.py").write_text(ROWS)
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel))
    link_distributions(core_distributions(), next(environment.glob("lib/python*/site-packages")))
    check = f"""
from importlib.util import find_spec
import dualspeed
print(dualspeed.__file__, [name for name in {NOT_CORE} if find_spec(name)], trainer.state.global_step)
"""
    code = FIRST.replace("Qwen/Qwen3-VL-2B-Instruct", "base").replace("from datasets import", "from rows import")
    code = code.replace("bf16=True)", "bf16=True, use_cpu=True)")
    (tmp_path / "example.py").write_text(code + check)
    package = next(environment.glob("lib/python*/site-packages/dualspeed/__init__.py"))
    assert run(str(python), "example.py", cwd=tmp_path).splitlines()[-1] == f"{package} [] 3"
    assert "usage: dualspeed" in run(str(environment / "bin" / "dualspeed"), "--help", cwd=tmp_path)


def test_public_names_resolve():
    for name in dualspeed.__all__:
        assert getattr(dualspeed, name).__name__ == name
    assert set(dir(dualspeed)) == set(dualspeed.__all__)
    with pytest.raises(AttributeError, match=r"no attribute 'trainer'; it has ConversationCollator, DualSpeedConfig"):
        _ = dualspeed.trainer


@pytest.mark.parametrize(
    "code",
    [
        "import dualspeed",
        "import dualspeed; dualspeed.DualSpeedConfig, dualspeed.LoraRecipe, dualspeed.Mode",
        "from dualspeed.cli import main; main(['--help'])",
    ],
)
def test_nothing_heavy_is_loaded(code):
    check = f"""
import sys
try:
    {code}
finally:
    print(sorted({HEAVY} & set(sys.modules)))
"""
    assert run(sys.executable, "-c", check).splitlines()[-1] == "[]"
