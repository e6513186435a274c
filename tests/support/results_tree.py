"""A results tree made by hand, with numbers that are easy to work out."""

import json
from dataclasses import asdict

from dualspeed.settings.method import DualSpeedConfig
from dualspeed.settings.project import METHODS

BENCHMARKS = ["gqa", "scienceqa"]
QUESTIONS = 100


def experiment(name, method, seed=0, tables=("table1", "figure4", "figure5"), **cells):
    """A row as the workflow describes it to the tables."""
    pruned = method != "baseline"
    return {
        "id": name,
        "model": "demo",
        "method": method,
        "seed": seed,
        "tables": list(tables),
        "dualspeed": asdict(DualSpeedConfig(**METHODS[method] | cells)),
        "inferences": ["full", "pruned"] if "table2" in tables else ["full"],
        "speed_key": f"p{cells.get('pruning_ratio', 0.9):g}" if pruned else None,
        "pretrain_key": f"{'fast' if pruned else 'full'}-{seed}",
        "settings_hash": f"hash-of-{name}",
    }


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_score(root, name, benchmark, right, inference="full"):
    """A score of `right` per cent: the first questions right, the others wrong."""
    is_right = [1.0 if number < right else 0.0 for number in range(QUESTIONS)]
    content = {
        "benchmark": benchmark,
        "metric": "accuracy",
        "score": right,
        "percent_metric": "accuracy",
        "percent": float(right),
        "num_questions": QUESTIONS,
        "num_missing": 1,
        "metrics": {"accuracy": right, "accuracy on (colours)": 12.5},
        "by_category": {
            "open": {"accuracy": float(2 * min(right, 50)), "num_questions": QUESTIONS // 2},
            "binary": {"accuracy": float(2 * max(right - 50, 0)), "num_questions": QUESTIONS // 2},
        },
        "statistics": [[value, 1.0] for value in is_right],
        "unit_ids": [str(number) for number in range(QUESTIONS)],
        "checksum": f"questions of {benchmark}",
    }
    write(root / "scores" / name / inference / f"{benchmark}.json", content)


def write_training(folder, seconds, mode="fast"):
    """What a stage of ten logged steps leaves: its loss halves from each to the next, at an even pace."""
    record = {"train_seconds": seconds, "samples_per_second": 10.0, "peak_memory_bytes": 1_000_000}
    record |= {"settings": {"recipe": {"global_batch_size": 16}}, "git_commit": "0" * 40, "machine": "a laptop"}
    write(folder / "training.json", record | {"versions": {"torch": "2.13.0"}})
    pace = 16 * 10 / seconds
    lines = [
        {"step": step, "time": 0, "metrics": {"loss": 1, f"{mode}/ce_loss": 0.5**step, "samples_per_second": pace}}
        for step in range(1, 11)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_tree(root):
    """Two Baselines and two DualSpeed models of two seeds, NaivePrune, and a model that has not been trained."""
    scores = {"base-0": (80, 60), "base-1": (90, 70), "naive-0": (40, 30), "ds-0": (72, 57), "ds-1": (90, 63)}
    seconds = {"base-0": 300.0, "base-1": 300.0, "naive-0": 100.0, "ds-0": 120.0, "ds-1": 120.0}
    for name, (gqa, scienceqa) in scores.items():
        write_score(root, name, "gqa", gqa)
        write_score(root, name, "scienceqa", scienceqa)
        write_training(root / "models" / name, seconds[name], "slow" if name.startswith("base") else "fast")
    write_score(root, "naive-0", "gqa", 76, "pruned")
    write_score(root, "naive-0", "scienceqa", 54, "pruned")
    write_score(root, "base-0", "gqa", 20, "pruned")
    for key, duration in {"full-0": 60.0, "full-1": 60.0, "fast-0": 30.0, "fast-1": 30.0}.items():
        write_training(root / "pretrain" / key, duration)
    times = {"baseline_step_seconds": 1.0, "fast_step_seconds": 0.25, "slow_step_seconds": 1.1}
    write(root / "speed" / "p0.9.json", times | {"theory_u": 0.2, "pruner_seconds": 0.005})
    shown = ("table1", "table2", "table3", "figure4", "figure5")
    return {
        "sheet": "demo",
        "results": str(root),
        "benchmarks": BENCHMARKS,
        "inference": {"pruner": "random", "pruning_ratio": 0.75},
        "experiments": [
            experiment("ds-0", "dualspeed", 0, ("table1", "table3", "figure4", "figure5")),
            experiment("ds-1", "dualspeed", 1, ("table1", "table3", "figure4", "figure5")),
            experiment("ds-p0.75", "dualspeed", 0, pruning_ratio=0.75),
            experiment("naive-0", "naive_prune", 0, shown),
            experiment("base-0", "baseline", 0, shown),
            experiment("base-1", "baseline", 1),
        ],
    }
