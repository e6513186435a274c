"""Benchmarks: official files in, LLaVA's prompts out, official scores back. Imports numpy, never torch.

A new benchmark is one module that makes a `Benchmark`, and one line here.
"""

from dualspeed.benchmarks.files import BenchmarkError
from dualspeed.benchmarks.gqa import GQA
from dualspeed.benchmarks.mme import MME
from dualspeed.benchmarks.pope import POPE
from dualspeed.benchmarks.records import Benchmark, Question, Record, unit_ids
from dualspeed.benchmarks.scienceqa import SCIENCEQA
from dualspeed.typed import check_choice

__all__ = ["BENCHMARKS", "Benchmark", "BenchmarkError", "Question", "Record", "get_benchmark", "unit_ids"]

BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in (GQA, MME, POPE, SCIENCEQA)}


def get_benchmark(name: str) -> Benchmark:
    """The benchmark called `name`. Raises ConfigError with the valid names."""
    check_choice("benchmark", name, BENCHMARKS)
    return BENCHMARKS[name]
