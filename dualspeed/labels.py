"""Names as papers write them. Whoever adds a pruner or a benchmark adds its line here."""

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
