"""Names as the paper writes them."""

METHOD_LABELS = {"baseline": "Baseline", "naive_prune": "NaivePrune", "dualspeed": "DualSpeed"}
PRUNER_LABELS = {"divprune": "DivPrune", "fastervlm": "FasterVLM", "cdpruner": "CDPruner", "random": "Random"}
BENCHMARK_LABELS = {"pope": "POPE", "gqa": "GQA", "scienceqa": "SQA", "mme": "MME"}
