"""Benchmarks: official files in, LLaVA's prompts out, official scores back. Imports numpy, never torch.

A new benchmark is one module that makes a `Benchmark`, and one line here.
"""

from dualspeed.benchmarks.gqa import GQA
from dualspeed.benchmarks.mmbench import MMBENCH, MMBENCH_CN, MMBENCH_CN_TEST, MMBENCH_TEST
from dualspeed.benchmarks.mme import MME
from dualspeed.benchmarks.pope import POPE
from dualspeed.benchmarks.records import Benchmark, Question, QuestionSet, Record, ServerBenchmark, unit_ids
from dualspeed.benchmarks.scienceqa import SCIENCEQA
from dualspeed.benchmarks.seedbench import SEEDBENCH
from dualspeed.benchmarks.textvqa import TEXTVQA
from dualspeed.benchmarks.vizwiz import VIZWIZ, VIZWIZ_TEST
from dualspeed.benchmarks.vqav2 import VQAV2, VQAV2_TEST
from dualspeed.errors import BenchmarkError
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

_SCORED_HERE = (GQA, MMBENCH, MMBENCH_CN, MME, POPE, SCIENCEQA, SEEDBENCH, TEXTVQA, VIZWIZ, VQAV2)
BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _SCORED_HERE}
SERVER_BENCHMARKS: dict[str, ServerBenchmark] = {
    benchmark.name: benchmark for benchmark in (MMBENCH_CN_TEST, MMBENCH_TEST, VIZWIZ_TEST, VQAV2_TEST)
}


def get_benchmark(name: str) -> Benchmark:
    """The benchmark called `name`, which is scored here. Raises ConfigError with the valid names."""
    if name in SERVER_BENCHMARKS:
        raise BenchmarkError(f"benchmark: only a server can score {name}; `dualspeed submit {name}` writes its file")
    check_choice("benchmark", name, BENCHMARKS)
    return BENCHMARKS[name]


def get_server_benchmark(name: str) -> ServerBenchmark:
    """The test split called `name`, which a server scores. Raises ConfigError with the valid names."""
    check_choice("benchmark", name, SERVER_BENCHMARKS)
    return SERVER_BENCHMARKS[name]


def get_question_set(name: str) -> QuestionSet:
    """The benchmark called `name`, whoever scores it. Raises ConfigError with the valid names."""
    check_choice("benchmark", name, BENCHMARKS | SERVER_BENCHMARKS)
    return (BENCHMARKS | SERVER_BENCHMARKS)[name]
