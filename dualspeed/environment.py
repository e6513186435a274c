"""Software of a run: the git commit of this checkout and the versions of the main packages."""

import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("dualspeed", "torch", "transformers", "accelerate", "datasets", "mlflow", "snakemake", "numpy", "pandas")


def environment() -> dict[str, Any]:
    """Software of this process: {"git_commit": str or None, "versions": {package: version}}."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # not installed: the library alone needs neither datasets nor snakemake
    return {"git_commit": git_commit(), "versions": versions}


def git_commit() -> str | None:
    """Hash of the checkout's commit, with `-dirty` if tracked files are modified; None outside a checkout."""
    repository = Path(__file__).resolve().parent.parent
    if not (repository / ".git").exists():  # git would find another project's checkout around an installed package
        return None
    command = ["git", "-C", str(repository), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None
