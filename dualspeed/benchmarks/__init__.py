"""Benchmarks: official files in, LLaVA's prompts out, official scores back. Imports numpy, never torch.

A new benchmark is one module with a `Benchmark`, and one line of `BENCHMARK_TABLE` in settings/names.py.
"""

from importlib import import_module
from typing import Any

from dualspeed.benchmarks.records import Benchmark, Question, QuestionSet, Record, ServerBenchmark, unit_ids
from dualspeed.errors import BenchmarkError
from dualspeed.settings.names import BENCHMARK_NAMES, BENCHMARK_TABLE, SERVER_FILES
from dualspeed.settings.reading import check_choice

__all__ = [
    "BENCHMARKS",
    "SERVER_BENCHMARKS",
    "Benchmark",
    "BenchmarkError",
    "Question",
    "QuestionSet",
    "Record",
    "ServerBenchmark",
    "get_benchmark",
    "get_question_set",
    "get_server_benchmark",
    "unit_ids",
]


def _load(name: str) -> Any:
    module = import_module(f"dualspeed.benchmarks.{BENCHMARK_TABLE[name].module or name}")
    return getattr(module, name.upper())


BENCHMARKS: dict[str, Benchmark] = {name: _load(name) for name in BENCHMARK_NAMES}
SERVER_BENCHMARKS: dict[str, ServerBenchmark] = {name: _load(name) for name in SERVER_FILES}


def get_benchmark(name: str) -> Benchmark:
    """Benchmark called `name`, which is scored here. Raises ConfigError with the valid names."""
    if name in SERVER_BENCHMARKS:
        raise BenchmarkError(f"benchmark: only a server can score {name}; `dualspeed submit {name}` writes its file")
    check_choice("benchmark", name, BENCHMARKS)
    return BENCHMARKS[name]


def get_server_benchmark(name: str) -> ServerBenchmark:
    """Test split called `name`, which a server scores. Raises ConfigError with the valid names."""
    check_choice("benchmark", name, SERVER_BENCHMARKS)
    return SERVER_BENCHMARKS[name]


def get_question_set(name: str) -> QuestionSet:
    """Benchmark or test split called `name`. Raises ConfigError with the valid names."""
    check_choice("benchmark", name, BENCHMARKS | SERVER_BENCHMARKS)
    return (BENCHMARKS | SERVER_BENCHMARKS)[name]
