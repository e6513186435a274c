"""Scores of answers files by the official rules, and files for the servers of test splits. Never imports torch."""

from pathlib import Path
from typing import Any

from dualspeed.benchmarks import get_benchmark, get_server_benchmark, unit_ids
from dualspeed.benchmarks.records import PROMPT_VERSION, by_category
from dualspeed.evaluation.answers import name_lines, read_answers
from dualspeed.evaluation.bootstrap import bootstrap_interval
from dualspeed.files import sha256_of_file, write_atomic, write_json


def score(benchmark: str, data: str | Path, answers: str | Path, out: str | Path) -> dict[str, Any]:
    """Score an answers file by the official rules, write METRICS.json and return its content.

    Args:
        benchmark: a name in BENCHMARKS.
        data: folder with the official files.
        answers: JSON lines in LLaVA's format, from any model, in any order.
        out: METRICS.json.

    Raises:
        ConfigError, BenchmarkError: an unknown benchmark, or a file that is wrong; names file, line and field.
    """
    chosen, data = get_benchmark(benchmark), Path(data)
    given = read_answers(Path(answers), chosen)
    with name_lines(given):
        records = chosen.score_answers(data, {question_id: text for question_id, (text, _) in given.items()})
    metrics, statistics = chosen.metrics(records), chosen.statistics(records)
    percent_interval = bootstrap_interval(chosen.name, statistics, chosen.percent_from_sums)
    interval = percent_interval
    if chosen.headline_statistics and chosen.headline_from_sums:
        interval = bootstrap_interval(chosen.name, chosen.headline_statistics(records), chosen.headline_from_sums)
    result = {
        "benchmark": chosen.name,
        "metric": chosen.headline,
        "score": metrics[chosen.headline],
        "interval": interval,
        "percent_metric": chosen.percent,
        "percent": metrics[chosen.percent],
        "percent_interval": percent_interval,
        "num_questions": len(records),
        "num_missing": sum(record.is_missing for record in records),
        "metrics": metrics,
        "by_category": by_category(records),
        "per_question": {record.question_id: record.score for record in records},
        "statistics": statistics.tolist(),
        "unit_ids": unit_ids(records),
        "checksum": sha256_of_file(chosen.question_file(data)),
        "prompt_version": PROMPT_VERSION,
    }
    write_json(out, result)
    return result


def submit(benchmark: str, data: str | Path, answers: str | Path, out: str | Path) -> None:
    """Write the file that a test split's server takes, in its format.

    Args:
        benchmark: a name in SERVER_BENCHMARKS.
        data: folder with the official files.
        answers: JSON lines in LLaVA's format, from any model, in any order.
        out: the file for the server.

    Raises:
        ConfigError, BenchmarkError: an unknown benchmark, or a file that is wrong; names file, line and field.
    """
    chosen = get_server_benchmark(benchmark)
    given = read_answers(Path(answers), chosen)
    with name_lines(given):
        content = chosen.submission(Path(data), {question_id: text for question_id, (text, _) in given.items()})
    write_atomic(out, content)
