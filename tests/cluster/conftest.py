"""Fixture of this folder: one Slurm for all tests."""

import shutil
import tempfile
from pathlib import Path

import pytest

from tests.support.slurm_cluster import Cluster, why_not


@pytest.fixture(scope="session")
def cluster():
    """Running Slurm of two nodes with one GPU each."""
    if reason := why_not():
        pytest.skip(f"no Slurm can be started here: {reason}")
    folder = Path(
        tempfile.mkdtemp(prefix="dualspeed-slurm-")
    )  # munge requires every folder above its own to be readable by all
    folder.chmod(0o755)
    cluster = Cluster(folder / "lab")
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)
