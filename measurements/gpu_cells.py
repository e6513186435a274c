"""Cells of measurements/gpu.py: a figure, or the reason why there is none; and what all parts share."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from measurements import gpu_device as devices
from measurements.gpu_models import REAL, Shape, toy


@dataclass(frozen=True)
class Reason:
    """Reason why a cell has no figure."""

    text: str


OUT_OF_MEMORY = "out of memory"
Cells = dict[str, float | str | Reason]
"""Cells of a row by column."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A table of the measurement."""

    name: str
    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    measure: Callable[["Bench", str, Cells], None]
    """Function that measures a row, given by its name, and fills its cells; columns that it leaves out get a reason."""
    seconds: int
    """Longest time of a row."""
    note: str = ""
    """Sentences that stand above the table."""


@dataclass(kw_only=True)
class Bench:
    """The device, the size of everything, and what one part keeps for a later one."""

    device: torch.device
    is_toy: bool = False
    held: dict[str, Any] = field(default_factory=dict)
    """Models and figures by name; models are dropped by `drop_models`."""

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shape of each model by its name."""
        return {name: toy(shape) for name, shape in REAL.items()} if self.is_toy else REAL

    @property
    def memory_bytes(self) -> int | None:
        """Memory that models may take; so little in toy size that one of them has to be measured at two depths."""
        return 2_100_000 if self.is_toy else devices.memory_bytes(self.device)

    @property
    def repeats(self) -> int:
        """Timed repetitions of each call, after one that is not timed."""
        return 1 if self.is_toy else 3

    def drop_models(self) -> None:
        """Free the models that are held."""
        self.held = {name: value for name, value in self.held.items() if not isinstance(value, torch.nn.Module)}
        gc.collect()
        devices.free_memory(self.device)


@contextmanager
def reasons(cells: Cells, columns: Sequence[str]) -> Iterator[None]:
    """Put the reason into `columns` if the block inside fails."""
    try:
        yield
    except Exception as error:  # a measurement goes on with the next figure, whatever went wrong in this one
        reason = Reason(explain(error))
        # The frames of the failed call hold its tensors.
        error.__traceback__ = None
        cells |= {column: reason for column in columns}


def explain(error: BaseException) -> str:
    """One line on why a measurement failed."""
    if isinstance(error, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line}"[:200]


def memory_cell(bench: Bench, call: Callable[[], object], with_present: bool = True) -> float | Reason:
    """Peak GiB of memory during a call; with_present: what is allocated before it counts too."""
    if not devices.counts_memory(bench.device):
        call()
        return Reason(f"{bench.device.type} counts no memory of its own")
    before = devices.start_peak(bench.device)
    call()
    return (devices.peak_bytes(bench.device) - (0 if with_present else before)) / 2**30
