"""Comparison with lmms-eval: one checkpoint, scored by lmms-eval and by us, in one table.

`run_lmms_eval` runs lmms-eval, if installed, on an unchanged checkpoint; `compare` writes its scores beside ours. Each
of its tasks is compared with our metric that follows the task's rule. Prompts still differ; docs/benchmarks.md says
how.
"""

import csv
import importlib.util
import io
import json
import sys
from pathlib import Path
from typing import Any

from dualspeed.errors import ConfigError
from dualspeed.files import write_atomic
from dualspeed.programs import run_program

# {benchmark: (task of lmms-eval, metric of that task, our metric with the same rule, our scale divided by its)}
TASKS = {
    "vqav2": ("vqav2_val", "exact_match", "accuracy_lmms_eval", 100),
    "vizwiz": ("vizwiz_vqa_val", "exact_match", "accuracy_lmms_eval", 100),
    "textvqa": ("textvqa_val", "exact_match", "accuracy_without_ocr", 100),
    "gqa": ("gqa", "exact_match", "accuracy_lmms_eval", 100),
    "scienceqa": ("scienceqa_img", "exact_match", "accuracy_lmms_eval", 100),
    "pope": ("pope", "pope_f1_score", "f1_lmms_eval", 100),
    # The task itself misspells this name.
    "mme": ("mme", "mme_percetion_score", "perception_lmms_eval", 1),
    "seedbench": ("seedbench", "seed_image", "accuracy_lmms_eval", 100),
    "mmbench": ("mmbench_en_dev", "gpt_eval_score", "accuracy_vlmevalkit", 1),
}
COLUMNS = ("benchmark", "headline", "ours", "same_rule", "ours_by_same_rule", "task", "lmms_eval")


def run_lmms_eval(model: str | Path, benchmarks: list[str], out: str | Path, batch_size: int) -> None:
    """Run lmms-eval on a checkpoint folder; it writes results and log to `out`.

    Raises:
        ConfigError: lmms-eval is not installed, or none of the benchmarks is one of TASKS.
        ProgramError: lmms-eval failed.
    """
    tasks = [TASKS[name][0] for name in benchmarks if name in TASKS]
    if not tasks:
        raise ConfigError(
            f"benchmarks: lmms-eval is run for none of {', '.join(benchmarks)}; valid: {', '.join(TASKS)}"
        )
    if importlib.util.find_spec("lmms_eval") is None:
        raise ConfigError(f"lmms-eval is not installed for {sys.executable}; try: pip install lmms-eval")
    Path(out).mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "lmms_eval", "--model", "llava_hf", "--model_args", f"pretrained={model}"]
    command += ["--tasks", ",".join(tasks), "--batch_size", str(batch_size), "--output_path", str(out)]
    run_program(command, capture=False)


def read_lmms_results(folder: str | Path) -> dict[str, dict[str, Any]]:
    """{task: {metric: value}} of the newest *_results.json under `folder`. Raises ConfigError if there is none."""
    files = sorted(Path(folder).rglob("*results.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise ConfigError(f"{folder}: lmms-eval left no *_results.json")
    results = json.loads(files[-1].read_text())["results"]
    # Metrics are named `<metric>,<filter>`.
    return {task: {name.partition(",")[0]: value for name, value in values.items()} for task, values in results.items()}


def compare(scores: str | Path, lmms: str | Path, out: str | Path) -> list[dict[str, Any]]:
    """Write a CSV file of our score, our score by lmms-eval's rule, and lmms-eval's score; return its rows.

    Args:
        scores: folder with a METRICS.json per benchmark.
        lmms: folder that `run_lmms_eval` wrote to.
        out: the CSV file.
    """
    results, rows = read_lmms_results(lmms), []
    for path in sorted(Path(scores).glob("*.json")):
        ours = json.loads(path.read_text())
        if ours["benchmark"] not in TASKS:
            continue
        task, metric, rule, scale = TASKS[ours["benchmark"]]
        value = results.get(task, {}).get(metric)
        cells = (ours["benchmark"], ours["metric"], ours["score"], rule, ours["metrics"].get(rule), task)
        theirs = scale * value if isinstance(value, int | float) else None
        rows.append(dict(zip(COLUMNS, (*cells, theirs), strict=True)))
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(out, text.getvalue())
    return rows


def evaluate_lmms(model: str | Path, scores: str | Path, work: str | Path, out: str | Path, batch_size: int) -> None:
    """Run lmms-eval on the benchmarks that `scores` has scores of, and write the comparison to `out`."""
    benchmarks = [json.loads(path.read_text())["benchmark"] for path in sorted(Path(scores).glob("*.json"))]
    run_lmms_eval(model, benchmarks, work, batch_size)
    compare(scores, work, out)
