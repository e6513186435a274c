"""Assignment of a workstation's GPUs to jobs: Snakemake limits how many are in use, this chooses which."""

import fcntl
import logging
import os
import tempfile
import time
from pathlib import Path

from dualspeed.errors import GpuError

NUM_GPUS = "DUALSPEED_NUM_GPUS"  # number of GPUs that a profile lets jobs share; unset where a scheduler assigns them
POLL_SECONDS = 1.0
logger = logging.getLogger(__name__)


def take_gpus(count: int) -> None:
    """Reserve `count` GPUs for this process, waiting until they are free, and set CUDA_VISIBLE_DEVICES to them.

    The reservation ends with the process; `exec` keeps it. If CUDA_VISIBLE_DEVICES is set already, the GPUs are chosen
    from that list. Does nothing for a count of 0, or if DUALSPEED_NUM_GPUS isn't set.

    Raises:
        GpuError: `count` is more than all GPUs that there are.
    """
    if not count or NUM_GPUS not in os.environ:
        return
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if devices == [""]:
        devices = [str(device) for device in range(int(os.environ[NUM_GPUS]))]
    if count > len(devices):
        raise GpuError(f"this job needs {count} GPUs, and all jobs here share {len(devices)}")
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
    os.set_inheritable(descriptor, True)  # so that the lock outlives an exec
    return True
