"""Hands out the GPUs of a workstation: Snakemake counts how many are taken, this says which."""

import fcntl
import logging
import os
import tempfile
import time
from pathlib import Path

from dualspeed.errors import GpuError

NUM_GPUS = "DUALSPEED_NUM_GPUS"  # GPUs that a profile shares out among jobs; unset where a scheduler does that
POLL_SECONDS = 1.0
logger = logging.getLogger(__name__)


def take_gpus(count: int) -> None:
    """Let this process see `count` GPUs that no other job sees, waiting for them if need be.

    They are this process's until it ends, and stay so through `exec`. Where CUDA_VISIBLE_DEVICES is set already, it
    is taken from those. Does nothing for a count of 0, or where DUALSPEED_NUM_GPUS is not set.
    """
    if not count or NUM_GPUS not in os.environ:
        return
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if devices == [""]:
        devices = [str(device) for device in range(int(os.environ[NUM_GPUS]))]
    if count > len(devices):
        raise GpuError(f"this job needs {count} GPUs, and there are {len(devices)} to share out")
    taken: list[str] = []
    while len(taken) < count:
        device = next((device for device in devices if device not in taken and _take(device)), None)
        if device is not None:
            taken.append(device)
        else:
            logger.info("waiting for a GPU")
            time.sleep(POLL_SECONDS)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(taken)
    del os.environ[NUM_GPUS]
    logger.info("on GPU %s", os.environ["CUDA_VISIBLE_DEVICES"])


def _take(device: str) -> bool:
    folder = Path(tempfile.gettempdir()) / f"dualspeed-gpus-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder / device, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return False
    os.set_inheritable(descriptor, True)  # an exec keeps the lock if it keeps the file
    return True
