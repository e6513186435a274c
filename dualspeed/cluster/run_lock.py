"""One job at a time in a state folder: a job that was submitted twice must not write into the run of the first."""

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dualspeed.errors import RunIsLiveError

LOCK_FILE = "lock"
logger = logging.getLogger(__name__)


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a state folder for as long as the block runs.

    It is a POSIX lock: the system lets go of it when the process ends, however it ends, and data loading workers
    that outlive a killed process don't inherit it.

    Raises:
        RunIsLiveError: another process holds it; the message says which, where and since when.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    with path.open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = path.read_text().strip() or "another job"
                raise RunIsLiveError(f"{folder}: {holder} trains this run; wait for it, or end it first") from None
            logger.warning("%s: no locks on this file system (%s): see that no run is submitted twice", folder, error)
        file.truncate(0)
        file.write(_describe_this_process())
        file.flush()
        yield


def _describe_this_process() -> str:
    job = f", Slurm job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
    return f"process {os.getpid()} on {socket.gethostname()}{job}, since {time.strftime('%Y-%m-%d %H:%M:%S')},"
