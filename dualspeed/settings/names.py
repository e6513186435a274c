"""Names as papers write them. Whoever adds a pruner or a benchmark adds its line here."""

from collections.abc import Iterable
from dataclasses import dataclass

METHOD_LABELS = {"baseline": "Baseline", "naive_prune": "NaivePrune", "dualspeed": "DualSpeed"}
PRUNER_LABELS = {
    "cdpruner": "CDPruner",
    "cdpruner_cen": "CDPruner + Cen",
    "divprune": "DivPrune",
    "divprune_cen": "DivPrune + Cen",
    "fastervlm": "FasterVLM",
    "mmtok": "MMTok",
    "otprune": "OTPrune",
    "prumerge": "PruMerge",
    "prumerge_plus": "PruMerge+",
    "random": "Random",
    "scope": "SCOPE",
    "spatial_pool": "Average pooling",
    "tome": "ToMe",
    "uniform": "Uniform",
    "visionzip": "VisionZip",
    "vispruner": "VisPruner",
}
PRUNER_NAMES = tuple(PRUNER_LABELS)
TEXT_PRUNERS = ("cdpruner", "cdpruner_cen", "mmtok")
"""Pruners that depend on the user's text, which code without torch has to know."""


@dataclass(frozen=True)
class BenchmarkName:
    """A benchmark's name in tables, and what code without numpy has to know of it."""

    label: str = ""
    """Name in tables; a test split has none, since its server scores it."""
    module: str = ""
    """Module of dualspeed/benchmarks; empty: the one with the benchmark's own name."""
    is_averaged: bool = True
    """False for a benchmark that the paper's means leave out."""
    server_file: str = ""
    """Ending of the file that the server of a test split takes; empty: the benchmark is scored here."""


# The one table of benchmarks, in the order of the paper's columns. A key is the name of the benchmark's constant in
# lower case.
BENCHMARK_TABLE = {
    "vqav2": BenchmarkName("VQAv2"),
    "gqa": BenchmarkName("GQA"),
    "scienceqa": BenchmarkName("SQA"),
    "textvqa": BenchmarkName("TextVQA"),
    "pope": BenchmarkName("POPE"),
    "mme": BenchmarkName("MME"),
    "mmbench": BenchmarkName("MMBench"),
    "mmbench_cn": BenchmarkName("MMBench-CN", module="mmbench"),
    "seedbench": BenchmarkName("SEED"),
    "vizwiz": BenchmarkName("VizWiz", is_averaged=False),
    "mmbench_cn_test": BenchmarkName(module="mmbench", server_file="xlsx"),
    "mmbench_test": BenchmarkName(module="mmbench", server_file="xlsx"),
    "vizwiz_test": BenchmarkName(module="vizwiz", server_file="json"),
    "vqav2_test": BenchmarkName(module="vqav2", server_file="json"),
}
BENCHMARK_LABELS = {name: entry.label for name, entry in BENCHMARK_TABLE.items() if not entry.server_file}
"""Label of each benchmark that is scored here."""
BENCHMARK_NAMES = tuple(sorted(BENCHMARK_LABELS))
"""Benchmarks that are scored here."""
SERVER_FILES = {name: entry.server_file for name, entry in BENCHMARK_TABLE.items() if entry.server_file}
"""Test splits that a server scores, with the ending of the file that it takes."""

TABLES = ("table1", "table2", "table3", "figure4", "figure5")


def in_paper_order(benchmarks: Iterable[str]) -> list[str]:
    """Benchmarks in the order of the paper's columns; others follow in the order given."""
    order = list(BENCHMARK_LABELS)
    return sorted(benchmarks, key=lambda name: order.index(name) if name in order else len(order))


def averaged(benchmarks: Iterable[str]) -> list[str]:
    """Benchmarks that means and Rel. are taken over: all but VizWiz, as in the paper; all, if nothing else is left."""
    benchmarks = list(benchmarks)
    left_out = [name for name, entry in BENCHMARK_TABLE.items() if not entry.is_averaged]
    return [name for name in benchmarks if name not in left_out] or benchmarks
