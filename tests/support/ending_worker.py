"""The first or the second of two processes; the first ends while a thread of Gloo waits for the interpreter's lock.

tests/cluster/test_launch.py starts both. The second joins the first one's collective late. By then the first is in the
last of its exit handlers, which holds the lock. With `--plain` it ends as any Python process does.
"""

import atexit
import ctypes
import os
import sys
import time
from datetime import timedelta

from dualspeed.cluster.launch import one_of_several

SECONDS = 4
held = []
"""Process groups: the threads of one that nothing holds end with it."""


def main(file: str) -> None:
    rank = int(os.environ["RANK"])
    if rank == 0:
        # PyDLL keeps the lock. The handlers of torch, which is imported afterwards, run before this one.
        atexit.register(ctypes.PyDLL(None).sleep, SECONDS)

    import torch
    from torch import distributed

    group = distributed.ProcessGroupGloo(distributed.FileStore(file, 2), rank, 2, timedelta(seconds=60))
    held.append(group)
    if rank == 1:
        time.sleep(SECONDS / 2)
    work = group.allreduce([torch.ones(3)])
    if rank == 1:
        work.wait()


if __name__ == "__main__":
    if "--plain" in sys.argv:
        main(sys.argv[1])
    else:
        with one_of_several():
            main(sys.argv[1])
