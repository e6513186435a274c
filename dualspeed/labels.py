"""Names as papers write them. Whoever adds a pruner adds its line here."""

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
BENCHMARK_LABELS = {"pope": "POPE", "gqa": "GQA", "scienceqa": "SQA", "mme": "MME"}
