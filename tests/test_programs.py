"""A program of others that is missing, or that fails, is one sentence."""

import subprocess
import sys
from pathlib import Path

import pytest

from dualspeed.errors import ProgramError
from dualspeed.programs import run_program


def test_output_of_a_program():
    assert run_program([sys.executable, "-c", "print('out')"]) == "out\n"


def test_a_failing_program_is_named_with_its_last_line():
    code = "import sys; print('first', file=sys.stderr); sys.exit('no such job')"
    with pytest.raises(ProgramError, match=r"-c ended with exit status 1: no such job$"):
        run_program([sys.executable, "-c", code])


def test_a_missing_program_is_named():
    with pytest.raises(ProgramError, match=r"^no-such-program: No such file or directory; valid: a machine where"):
        run_program(["no-such-program"])


def test_end_jobs_without_slurm_is_one_line(tmp_path):
    """The log of a killed snakemake asks for its jobs, and this machine has no squeue."""
    logs = tmp_path / ".snakemake" / "log"
    logs.mkdir(parents=True)
    (logs / "run.log").write_text("SLURM run ID: 0f5e\n")
    done = subprocess.run(
        [sys.executable, "-m", "dualspeed.cli", "end-jobs"],
        cwd=tmp_path,
        env={"PATH": "", "PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert (
        done.stderr == "dualspeed end-jobs: squeue: No such file or directory; valid: a machine where it is installed\n"
    )
