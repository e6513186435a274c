"""The driver of the fuzz tests: `fuzz(reader, inputs, check)` feeds mutated inputs to a reader and prints the counts.

`make fuzz` runs them with many inputs, the test suite with few. Inputs depend on the seed and their number alone.
"""

import resource
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from dualspeed.errors import DualSpeedError

BATCH = 500
"""Inputs of one seed; a new one starts with little in Hypothesis' memory."""
MOST_SECONDS = 20
"""Longest time of the processor for one input, which other work beside it does not lengthen."""
MOST_MEGABYTES = 600
"""Growth of the process over all inputs."""

Check = Callable[[Any], str]
"""Function that reads an input and says how it ended: `read`, `dropped` and the like. An error of the project is
counted as refused; any other error is a finding."""


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/fuzz/" in str(item.path):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def fuzz(request, capsys):
    """Function that fuzzes one reader; `share` of the inputs asked for, for readers that take milliseconds each."""

    def run(reader: str, inputs: SearchStrategy, check: Check, share: float = 1.0) -> Counter:
        wanted = max(1, int(request.config.getoption("--fuzz-inputs") * share))
        counts: Counter = Counter()
        memory = _peak()
        for first in range(0, wanted, BATCH):
            _run_batch(inputs, check, counts, first, min(BATCH, wanted - first))
        grown = _peak() - memory
        ends = ", ".join(f"{count} {end}" for end, count in counts.most_common())
        with capsys.disabled():
            print(f"\nfuzz {reader}: {counts.total()} inputs: {ends}; {grown:.0f} MB more")
        assert counts.total() >= wanted
        assert grown < MOST_MEGABYTES, f"{reader}: reading took {grown:.0f} MB"
        return counts

    return run


def _run_batch(inputs: SearchStrategy, check: Check, counts: Counter, number: int, size: int) -> None:
    @seed(number)
    @settings(
        max_examples=size,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(inputs)
    def read(value: Any) -> None:
        start = time.process_time()
        try:
            end = check(value)
        except DualSpeedError as error:
            assert str(error).strip(), f"{type(error).__name__} without a message"
            end = f"refused ({type(error).__name__})"
        assert time.process_time() - start < MOST_SECONDS, f"took {time.process_time() - start:.0f} s of the processor"
        counts[end] += 1

    read()


def _peak() -> float:
    """Largest memory of this process so far, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
