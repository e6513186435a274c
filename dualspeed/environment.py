"""What a run ran on: the commit of this checkout and the versions of the packages that matter."""

import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("dualspeed", "torch", "transformers", "accelerate", "datasets", "mlflow", "snakemake", "numpy", "pandas")


def environment() -> dict[str, Any]:
    """{"git_commit": see `git_commit`, "versions": {package: version of those that are installed}}."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # the library alone needs neither datasets nor snakemake
    return {"git_commit": git_commit(), "versions": versions}


def git_commit() -> str | None:
    """Hash of the checkout's commit, `-dirty` behind it where tracked files differ; None outside a checkout."""
    repository = Path(__file__).resolve().parent.parent
    if not (repository / ".git").exists():  # an installed package may lie inside another project's checkout
        return None
    command = ["git", "-C", str(repository), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None
