"""Lock of a state folder: a job that is submitted twice must not write to the same run at the same time."""

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
    """Hold the lock of a state folder while the block runs.

    The lock is a POSIX lock: the system releases it when the process ends, even by a kill, and data loading workers
    that outlive the process don't inherit it.

    Raises:
        RunIsLiveError: another process holds the lock; the message names the process, its machine and start time.
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
            logger.warning(
                "%s: this file system has no locks (%s): make sure that no run is submitted twice", folder, error
            )
        file.truncate(0)
        file.write(_describe_this_process())
        file.flush()
        yield


def _describe_this_process() -> str:
    job = f", Slurm job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
    return f"process {os.getpid()} on {socket.gethostname()}{job}, since {time.strftime('%Y-%m-%d %H:%M:%S')},"
