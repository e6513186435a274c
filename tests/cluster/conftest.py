"""One Slurm for all tests of this folder."""

import shutil
import tempfile
from pathlib import Path

import pytest

from tests.support.slurm_cluster import Cluster, why_not


@pytest.fixture(scope="session")
def cluster():
    """A running Slurm of two nodes with a GPU each."""
    if reason := why_not():
        pytest.skip(f"no Slurm can be started here: {reason}")
    folder = Path(tempfile.mkdtemp(prefix="dualspeed-slurm-"))  # munge wants every folder above open to all
    folder.chmod(0o755)
    cluster = Cluster(folder / "lab")
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)
