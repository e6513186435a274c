"""The wheel outside the checkout, with the core dependencies alone; a command line that answers at once."""

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

from tests.support.paths import REPOSITORY
from tests.support.readme import TRAINING, make_inputs

# Of the extras, and nothing that core dependencies need.
NOT_CORE = ("datasets", "matplotlib", "mlflow", "pandas", "peft", "pyarrow", "requests", "snakemake")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that no build folder stays in the checkout."""
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
    """What dualspeed needs without its extras, and what that needs in turn: names of installed distributions."""
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
    """Lay the installed files of distributions into another environment, without installing them again."""
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
    assert {path.relative_to(REPOSITORY).as_posix() for path in files} <= set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
def test_wheel_and_core_dependencies_run_the_readme(wheel, tmp_path):
    make_inputs(tmp_path)
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
    (tmp_path / "example.py").write_text(TRAINING + check)
    package = next(environment.glob("lib/python*/site-packages/dualspeed/__init__.py"))
    assert run(str(python), "example.py", cwd=tmp_path).splitlines()[-1] == f"{package} [] 2"
    assert "usage: dualspeed" in run(str(environment / "bin" / "dualspeed"), "--help", cwd=tmp_path)


def test_help_loads_nothing_heavy():
    code = """
import sys
from dualspeed.cli import main
try:
    main(["--help"])
finally:
    print(sorted({"torch", "transformers", "mlflow", "pandas", "matplotlib", "numpy"} & set(sys.modules)))
"""
    assert run(sys.executable, "-c", code).splitlines()[-1] == "[]"
