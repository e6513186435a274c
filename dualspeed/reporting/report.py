"""One HTML page with everything that a sheet's experiments gave; it opens from disk and loads nothing from elsewhere.

Tables that sort by a click, figures, example questions with every model's answer, the machines and versions, and for
each experiment the settings, the files and the command behind its numbers.
"""

import base64
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from dualspeed.environment import environment
from dualspeed.evaluation.bootstrap import resample_scores
from dualspeed.files import write_atomic
from dualspeed.reporting.examples import read_examples
from dualspeed.reporting.frames import Results, finetune_path, read_json, read_results, score_path, training_path
from dualspeed.reporting.summary import summarise, typical_rows
from dualspeed.reporting.table_cells import format_relative, time_unit
from dualspeed.reporting.table_format import NOT_RUN, TEXT_COLUMNS, format_mean, format_number
from dualspeed.reporting.tables import make_tables
from dualspeed.settings.names import BENCHMARK_LABELS, METHOD_LABELS, PRUNER_LABELS, in_paper_order

FIGURES = {
    "figure_mismatch": "The same models answering on full and on pruned tokens.",
    "figure4": "Training time, its stages apart.",
    "figure5": "Speed against performance, over pruning ratios and over slow-mode ratios.",
    "figure_learning_curves": "Loss and held-out accuracy against training time, and the benchmarks' score at its end.",
    "figure_question_types": "Accuracy by type of question on full tokens.",
    "figure_speedup": "Measured speedup of a step, and the limit that FLOPs set.",
    "kept_tokens": "What each pruning method keeps of a picture: the framed tokens, their number in brackets.",
}


def write_report(settings: dict[str, Any], figures: Path, out: Path) -> None:
    """Write the page to `out`, with the svg files that are under `figures`.

    Args:
        settings: as of `tables.write_tables`, and "folders": {benchmark: folder of its official files}, "command":
            the Snakemake call that makes this sheet.
    """
    results = read_results(settings)
    scores = resample_scores(results.statistics)
    rows = summarise(settings, results, scores, "table1")
    found = {name: Path(figures) / f"{name}.svg" for name in FIGURES}
    page = make_template().render(
        sheet=settings["sheet"],
        command=settings["command"],
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        headline=headline(typical_rows(rows)),
        tables=[table_view(table) for table in make_tables(settings, results, scores)],
        figures=[(name, FIGURES[name], embed_svg(path)) for name, path in found.items() if path.exists()],
        examples=read_examples(settings, typical_rows(rows)),
        environments=environments(settings),
        here=environment(),
        experiments=[experiment_view(settings, results, one) for one in settings["experiments"]],
        results=settings["results"],
    )
    write_atomic(out, page)


def make_template() -> jinja2.Template:
    """The page's template; whatever it shows is escaped."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("report.html.jinja")


def headline(rows: pd.DataFrame) -> list[dict[str, str]]:
    """What the page says first, one card a method: score, Rel., speedup, training time."""
    rows = rows[rows["inference"] == "full"]
    unit, seconds = time_unit(rows["train_hours"] * 3600)
    return [
        {
            "method": METHOD_LABELS[row.method],
            "pruner": ""
            if pd.isna(row.pruner)
            else f"{PRUNER_LABELS.get(row.pruner, row.pruner)}, p = {row.pruning_ratio:g}, r = {row.slow_mode_ratio:g}",
            "mean": format_mean(row.mean, row.mean_std),
            "rel": format_relative(row),
            "speedup": format_number(row.speedup_measured, 2, "x"),
            "time": format_number(3600 * row.train_hours / seconds, 1, f" {unit}"),
        }
        for row in rows.itertuples()
    ]


def table_view(table: Any) -> dict[str, Any]:
    """What the template shows of a table: {"text", "is_best", "is_grey", "is_number", "not_run"} of each cell."""
    lines = [
        [
            {
                "text": text,
                "is_best": (row, column) in table.best,
                "is_grey": column in table.grey,
                "is_number": column not in TEXT_COLUMNS,
                "not_run": text == NOT_RUN,
            }
            for column, text in cells.items()
        ]
        for row, cells in enumerate(table.cells.to_dict("records"))
    ]
    return {
        "name": table.name,
        "title": table.title,
        "columns": list(table.cells),
        "lines": lines,
        "notes": table.notes,
        "grey": table.grey,
        "text_columns": TEXT_COLUMNS,
    }


def embed_svg(path: Path) -> str:
    """A figure as a data URI."""
    return f"data:image/svg+xml;base64,{base64.b64encode(path.read_bytes()).decode()}"


def environments(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """What the stages were trained on: {"machine", "commit", "versions", "stages"}, equal ones together."""
    root = Path(settings["results"])
    found: dict[tuple[str, str, str], dict[str, None]] = {}
    for experiment in settings["experiments"]:
        for stage in ("pretrain", "finetune"):
            path = training_path(root, experiment, stage)
            if path is None or not path.exists():
                continue
            record = read_json(path)
            versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
            key = record.get("machine", "unknown"), record.get("git_commit") or "unknown", versions
            found.setdefault(key, {})[path.parent.name] = None
    return [
        {"machine": machine, "commit": commit, "versions": versions, "stages": list(stages)}
        for (machine, commit, versions), stages in found.items()
    ]


def experiment_view(settings: dict[str, Any], results: Results, experiment: dict[str, Any]) -> dict[str, Any]:
    """Where the numbers of one experiment come from: settings, training, and a line for each score."""
    root, name = Path(settings["results"]), experiment["id"]
    training = finetune_path(root, experiment)
    record = read_json(training) if training.exists() else {}
    facts = {
        "model": experiment["model"],
        "method": METHOD_LABELS[experiment["method"]],
        "seed": experiment["seed"],
        **experiment["dualspeed"],
        "pretraining": experiment["pretrain_key"] or "none",
        "settings_hash (tag of its MLflow run)": experiment["settings_hash"],
    }
    for key in ("num_steps", "num_slow_steps", "train_seconds", "samples_per_second", "peak_memory_bytes"):
        if key in record:
            facts[key] = f"{record[key]:,.1f}".removesuffix(".0")
    return {"id": name, "facts": facts, "is_trained": bool(record), "scores": score_lines(settings, results, name)}


def score_lines(settings: dict[str, Any], results: Results, experiment: str) -> list[dict[str, str]]:
    """One line a score of an experiment: its value, the file it stands in, and the questions it was taken on."""
    mine = results.scores[results.scores["experiment"] == experiment]
    order = in_paper_order(settings["benchmarks"])
    lines = []
    for row in sorted(mine.itertuples(), key=lambda row: (row.inference, order.index(row.benchmark))):
        path = score_path(Path(settings["results"]), experiment, row.inference, row.benchmark)
        lines.append(
            {
                "benchmark": BENCHMARK_LABELS.get(row.benchmark, row.benchmark),
                "inference": row.inference,
                "score": f"{row.score:.2f}",
                "metric": row.metric,
                "num_questions": f"{row.num_questions:,}",
                "checksum": read_json(path)["checksum"][:12],
                "file": str(path),
            }
        )
    return lines
