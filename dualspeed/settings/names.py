"""Names as papers write them. Whoever adds a pruner or a benchmark adds its line here."""

from collections.abc import Iterable

METHOD_LABELS = {"baseline": "Baseline", "naive_prune": "NaivePrune", "dualspeed": "DualSpeed"}
PRUNER_LABELS = {
    "cdpruner": "CDPruner",
    "divprune": "DivPrune",
    "fastervlm": "FasterVLM",
    "prumerge": "PruMerge",
    "prumerge_plus": "PruMerge+",
    "random": "Random",
    "spatial_pool": "Average pooling",
    "tome": "ToMe",
    "uniform": "Uniform",
    "visionzip": "VisionZip",
    "vispruner": "VisPruner",
}
PRUNER_NAMES = tuple(PRUNER_LABELS)
# In the order of the paper's columns, which is that of ours.
BENCHMARK_LABELS = {
    "vqav2": "VQAv2",
    "gqa": "GQA",
    "scienceqa": "SQA",
    "textvqa": "TextVQA",
    "pope": "POPE",
    "mme": "MME",
    "mmbench": "MMBench",
    "mmbench_cn": "MMBench-CN",
    "seedbench": "SEED",
    "vizwiz": "VizWiz",
}
BENCHMARK_NAMES = (
    *("gqa", "mmbench", "mmbench_cn", "mme", "pope"),
    *("scienceqa", "seedbench", "textvqa", "vizwiz", "vqav2"),
)
# Test splits that are answered here and scored by a server, with the ending of the file that it takes.
SERVER_FILES = {"mmbench_cn_test": "xlsx", "mmbench_test": "xlsx", "vizwiz_test": "json", "vqav2_test": "json"}

TABLES = ("table1", "table2", "table3", "figure4", "figure5")


def in_paper_order(benchmarks: Iterable[str]) -> list[str]:
    """Benchmarks in the order of the paper's columns; those that it doesn't have follow as they stand."""
    order = list(BENCHMARK_LABELS)
    return sorted(benchmarks, key=lambda name: order.index(name) if name in order else len(order))


def averaged(benchmarks: Iterable[str]) -> list[str]:
    """Those of the benchmarks that means and Rel. are taken over: the paper's don't hold VizWiz."""
    benchmarks = list(benchmarks)
    return [name for name in benchmarks if name != "vizwiz"] or benchmarks
