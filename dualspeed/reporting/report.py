"""HTML page with all results of a sheet; it opens from disk and loads no other file.

It has the tables, which sort by a click, the figures, example questions with the answers of each model, the machines
and versions, and for each row the settings, files and command behind its numbers.
"""

import base64
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from dualspeed.environment import environment
from dualspeed.files import write_atomic
from dualspeed.reporting.examples import read_examples
from dualspeed.reporting.frames import (
    SCORE_FIELDS,
    Results,
    read_fields,
    read_results,
    read_training,
    training_folders,
)
from dualspeed.reporting.summary import is_baseline, slow_steps_of, summarise_table, typical_rows
from dualspeed.reporting.table_cells import format_relative, time_unit
from dualspeed.reporting.table_format import NOT_RUN, TEXT_COLUMNS, Table, format_mean, format_number
from dualspeed.reporting.tables import make_tables
from dualspeed.settings.identity import record
from dualspeed.settings.jobs import ReportSettings
from dualspeed.settings.names import BENCHMARK_LABELS, METHOD_LABELS, PRUNER_LABELS
from dualspeed.settings.sheet import Row

FIGURES = {
    "figure_mismatch": "The same models answering on full and on pruned tokens.",
    "figure4": "Training time, its stages apart.",
    "figure5": "Speed against performance, over pruning ratios and over slow-mode ratios.",
    "figure_learning_curves": "Loss and held-out accuracy against training time, and the benchmarks' score at its end.",
    "figure_question_types": "Accuracy by type of question on full tokens.",
    "figure_speedup": "Measured speedup of a step, and the limit that FLOPs set.",
    "kept_tokens": "What each pruning method keeps of a picture: the framed tokens, their number in brackets.",
}


def write_report(settings: ReportSettings, figures: Path, out: Path) -> None:
    """Write the page to `out`, with the svg files under `figures` embedded.

    Raises:
        ResultsError, BenchmarkError: a result or a file of answers is broken.
    """
    sheet = settings.sheet
    results = read_results(sheet)
    typical = typical_rows(summarise_table(results, "table1"))
    found = {name: Path(figures) / f"{name}.svg" for name in FIGURES}
    page = make_template().render(
        sheet=sheet.name,
        command=settings.command,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        headline=headline(typical),
        tables=[table_view(table) for table in make_tables(results)],
        figures=[(name, FIGURES[name], embed_svg(path)) for name, path in found.items() if path.exists()],
        examples=read_examples(settings, typical),
        environments=environments(results),
        here=environment(),
        rows=[row_view(results, row) for row in sheet.rows],
        layout=results.layout,
    )
    write_atomic(out, page)


def make_template() -> jinja2.Template:
    """Template of the page; it escapes all text that it shows."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("report.html.jinja")


def headline(summary: pd.DataFrame) -> list[dict[str, str]]:
    """Cards at the top of the page, one for each method: score, Rel., speedup, training time."""
    summary = summary[summary["inference"] == "full"]
    unit, seconds = time_unit(summary["train_hours"] * 3600)
    return [
        {
            "method": METHOD_LABELS[line.method],
            "pruner": ""
            if is_baseline(line)
            else f"{PRUNER_LABELS[line.pruner]}, p = {line.pruning_ratio:g}, {slow_steps_of(line)}",
            "mean": format_mean(line.mean, line.mean_std),
            "rel": format_relative(line),
            "speedup": format_number(line.speedup_measured, 2, "x"),
            "time": format_number(3600 * line.train_hours / seconds, 1, f" {unit}"),
        }
        for line in summary.itertuples()
    ]


def table_view(table: Table) -> dict[str, Any]:
    """A table for the template; a cell is {"text", "is_best", "is_grey", "is_number", "not_run"}."""
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
    """Figure as a data URI."""
    return f"data:image/svg+xml;base64,{base64.b64encode(path.read_bytes()).decode()}"


def environments(results: Results) -> list[dict[str, Any]]:
    """Environments that the stages were trained in, without repeats: {"machine", "commit", "versions", "stages"}."""
    found: dict[tuple[str, str, str], dict[str, None]] = {}
    for row in results.sheet.rows:
        for folder in training_folders(results.layout, row).values():
            training = read_training(folder)
            if training is None:
                continue
            versions = ", ".join(f"{name} {version}" for name, version in training.get("versions", {}).items())
            key = training.get("machine", "unknown"), training.get("git_commit") or "unknown", versions
            found.setdefault(key, {})[folder.name] = None  # a dict, since rows share pretrainings
    return [
        {"machine": machine, "commit": commit, "versions": versions, "stages": list(stages)}
        for (machine, commit, versions), stages in found.items()
    ]


def row_view(results: Results, row: Row) -> dict[str, Any]:
    """A row for the template: its settings, its training, and a line for each score."""
    training = read_training(training_folders(results.layout, row)["finetune"]) or {}
    facts = {
        "model": row.model,
        "method": METHOD_LABELS[row.method],
        "seed": row.seed,
        **record(row.dualspeed),
        "pretraining": row.pretrain_key or "none",
        "settings_hash (tag of its MLflow run)": row.settings_hash,
    }
    for key in ("num_steps", "num_slow_steps", "train_seconds", "samples_per_second", "peak_memory_bytes"):
        if key in training:
            facts[key] = f"{training[key]:,.1f}".removesuffix(".0")
    return {"id": row.id, "facts": facts, "is_trained": bool(training), "scores": score_lines(results, row)}


def score_lines(results: Results, row: Row) -> list[dict[str, str]]:
    """One line for each score of a row: its value, its file, and the questions it was taken on."""
    scores = results.scores[results.scores["experiment"] == row.id]
    order = results.benchmarks
    lines = []
    for score in sorted(scores.itertuples(), key=lambda score: (score.inference, order.index(score.benchmark))):
        path = Path(results.layout.score(row.id, score.inference, score.benchmark))
        lines.append(
            {
                "benchmark": BENCHMARK_LABELS[score.benchmark],
                "inference": score.inference,
                "score": f"{score.score:.2f}",
                "metric": score.metric,
                "num_questions": f"{score.num_questions:,}",
                "checksum": read_fields(path, SCORE_FIELDS)["checksum"][:12],
                "file": str(path),
            }
        )
    return lines
