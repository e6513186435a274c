"""Results folder of a made-up sheet, with numbers that are easy to work out by hand."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from dualspeed.layout import METRICS_FILE, TRAINING_RECORD, Layout
from dualspeed.settings.method import DualSpeedConfig
from dualspeed.settings.sheet import PrunedInference, Row, Sheet
from dualspeed.settings.sheet_file import METHODS

BENCHMARKS = ("gqa", "scienceqa")
QUESTIONS = 100  # of each benchmark


def make_row(name: str, method: str, seed: int = 0, tables=("table1", "figure4", "figure5"), **cells: Any) -> Row:
    """Row of a method whose settings `cells` change."""
    prunes = method != "baseline"
    return Row(
        id=name,
        model="demo",
        method=method,
        seed=seed,
        tables=tuple(tables),
        dualspeed=DualSpeedConfig(**METHODS[method] | cells),
        speed_key=f"p{cells.get('pruning_ratio', 0.9):g}" if prunes else None,
        pretrain_key=f"{'fast' if prunes else 'full'}-{seed}",
        settings_hash=f"hash-of-{name}",
    )


def change_rows(sheet: Sheet, **changes: Any) -> Sheet:
    """`sheet` with fields of all of its rows changed."""
    return replace(sheet, rows=tuple(replace(row, **changes) for row in sheet.rows))


def write(path: str | Path, content: Any) -> None:
    """Write a JSON file, and its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_score(layout: Layout, name: str, benchmark: str, right: int, inference: str = "full") -> None:
    """Write a score of `right` percent: the first questions are right, the others wrong."""
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
    write(layout.score(name, inference, benchmark), content)


def write_training(folder: str | Path, seconds: float, mode: str = "fast") -> None:
    """Write training record and metrics of ten steps; each takes the same time and halves the loss."""
    record = {"train_seconds": seconds, "samples_per_second": 10.0, "peak_memory_bytes": 1_000_000}
    record |= {"settings": {"recipe": {"global_batch_size": 16}}, "git_commit": "0" * 40, "machine": "a laptop"}
    write(Path(folder) / TRAINING_RECORD, record | {"versions": {"torch": "2.13.0"}})
    pace = 16 * 10 / seconds
    lines = [
        {"step": step, "time": 0, "metrics": {"loss": 1, f"{mode}/ce_loss": 0.5**step, "samples_per_second": pace}}
        for step in range(1, 11)
    ]
    (Path(folder) / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_tree(root: Path) -> Sheet:
    """Write the results of two seeds of Baseline and DualSpeed and one of NaivePrune; one row has not been trained."""
    layout = Layout(str(root))
    scores = {"base-0": (80, 60), "base-1": (90, 70), "naive-0": (40, 30), "ds-0": (72, 57), "ds-1": (90, 63)}
    seconds = {"base-0": 300.0, "base-1": 300.0, "naive-0": 100.0, "ds-0": 120.0, "ds-1": 120.0}
    for name, (gqa, scienceqa) in scores.items():
        write_score(layout, name, "gqa", gqa)
        write_score(layout, name, "scienceqa", scienceqa)
        write_training(layout.model(name), seconds[name], "slow" if name.startswith("base") else "fast")
    write_score(layout, "naive-0", "gqa", 76, "pruned")
    write_score(layout, "naive-0", "scienceqa", 54, "pruned")
    write_score(layout, "base-0", "gqa", 20, "pruned")
    for key, duration in {"full-0": 60.0, "full-1": 60.0, "fast-0": 30.0, "fast-1": 30.0}.items():
        write_training(layout.pretraining(key), duration)
    times = {"baseline_step_seconds": 1.0, "fast_step_seconds": 0.25, "slow_step_seconds": 1.1}
    write(layout.speed("p0.9"), times | {"theory_u": 0.2, "pruner_seconds": 0.005})
    shown = ("table1", "table2", "table3", "figure4", "figure5")
    return Sheet(
        name="demo",
        results=str(root),
        benchmarks=BENCHMARKS,
        inference=PrunedInference(pruner="random", pruning_ratio=0.75),
        rows=(
            make_row("ds-0", "dualspeed", 0, ("table1", "table3", "figure4", "figure5")),
            make_row("ds-1", "dualspeed", 1, ("table1", "table3", "figure4", "figure5")),
            make_row("ds-p0.75", "dualspeed", 0, pruning_ratio=0.75),
            make_row("naive-0", "naive_prune", 0, shown),
            make_row("base-0", "baseline", 0, shown),
            make_row("base-1", "baseline", 1),
        ),
    )
