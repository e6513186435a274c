"""Random state of a process: Python's, numpy's and torch's."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def kept_random_state(device: torch.device) -> Iterator[None]:
    """Restore all random states after the context, so that what happens inside changes nothing after it."""
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        yield
    random.setstate(python)
    np.random.set_state(arrays)
