"""Programs of others that jobs start, such as Slurm's commands and lmms-eval."""

import subprocess
from collections.abc import Sequence

from dualspeed.errors import ProgramError


def run_program(command: Sequence[str], capture: bool = True) -> str:
    """Run a command and return its output.

    Args:
        capture: False leaves its output to the terminal, and returns nothing of it.

    Raises:
        ProgramError: the program is missing, or it failed; the message ends with the last line of its errors.
    """
    try:
        done = subprocess.run(command, capture_output=capture, text=True)
    except OSError as error:
        raise ProgramError(f"{command[0]}: {error.strerror}; valid: a machine where it is installed") from None
    if done.returncode:
        errors = (done.stderr or "").strip().splitlines() or ["see its output above"]
        raise ProgramError(f"{' '.join(command[:2])} ended with exit status {done.returncode}: {errors[-1]}")
    return done.stdout or ""
