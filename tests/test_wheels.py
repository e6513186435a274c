"""`make wheels`: its folder installs without an index."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY

pytestmark = pytest.mark.slow


def run(*command: str, cwd: Path, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_FIND")}
    done = subprocess.run(command, cwd=cwd, env=environment | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_machine_without_internet_installs_from_the_folder(tmp_path):
    """The package and one of its dependencies alone, which are small."""
    clone = tmp_path / "clone"
    shutil.copytree(REPOSITORY / "dualspeed", clone / "dualspeed", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "Makefile", "constraints.txt"):
        shutil.copy(REPOSITORY / name, clone)
    run("make", "wheels", f"PYTHON={sys.executable}", "PACKAGES=--no-deps . pyyaml", cwd=clone)
    names = sorted(file.name.split("-")[0].lower() for file in (clone / "wheels").iterdir())
    assert names == ["dualspeed", "pyyaml"]

    venv.create(tmp_path / "offline", with_pip=True)
    python = str(tmp_path / "offline/bin/python")
    # A proxy that isn't there: whatever asks for the network fails.
    offline = {"PIP_CONFIG_FILE": os.devnull, "HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
    wheels = ["--no-index", "--find-links", str(clone / "wheels")]
    run(python, "-m", "pip", "install", *wheels, "--no-deps", "dualspeed", "pyyaml", cwd=tmp_path, **offline)
    listed = run(python, "-m", "pip", "list", "--format=freeze", cwd=tmp_path, **offline)
    assert "dualspeed==" in listed and "PyYAML==" in listed
    assert "train" in run(str(tmp_path / "offline/bin/dualspeed"), "--help", cwd=tmp_path)
