"""Answers and official files of each benchmark, damaged: every question has a score, or the file is refused."""

import json
import math

import pytest

from dualspeed.benchmarks import BENCHMARKS
from dualspeed.evaluation.answers import name_lines, read_answers
from tests.support import official
from tests.support.mutations import mutated_text, mutated_values

NAMES = sorted(official.WRITERS)
KEPT = 6
"""Lines of the answers that are mutated; the longer a file, the rarer is what a mutation finds."""
SHARE = 1 / len(NAMES)
"""Part of the inputs asked for that each benchmark gets."""


def as_json(value):
    return json.dumps(value).encode()


def as_lines(records):
    return "\n".join(map(json.dumps, records if isinstance(records, list) else [records])).encode()


def check_scores(name, folder, answers):
    """Score answers; every official question has one score."""
    benchmark = BENCHMARKS[name]
    given = read_answers(answers, benchmark)
    with name_lines(given):
        records = benchmark.score_answers(folder, {key: text for key, (text, _) in given.items()})
    assert all(0 <= record.score <= 1 for record in records)
    assert len({record.question_id for record in records}) == len(records)
    metrics = benchmark.metrics(records)
    assert all(math.isfinite(value) for value in metrics.values())
    json.dumps(metrics)
    return "scored" if records else "no questions"


@pytest.mark.parametrize("name", NAMES)
def test_answers(name, fuzz, tmp_path):
    folder = official.write_benchmark(name, tmp_path / name)
    lines = (folder / "answers.jsonl").read_text().splitlines()[:KEPT]
    path = tmp_path / "answers.jsonl"

    def check(content):
        path.write_bytes(content)
        return check_scores(name, folder, path)

    values = mutated_values([[json.loads(line) for line in lines]]).map(as_lines)
    counts = fuzz(f"answers ({name})", values | mutated_text(["\n".join(lines)]), check, SHARE)
    assert {"scored", "refused (BenchmarkError)"} <= set(counts)


@pytest.mark.parametrize("name", NAMES)
def test_official_files(name, fuzz, tmp_path):
    """One file of the folder at a time; questions are loaded too, as before they are asked."""
    folder = official.write_benchmark(name, tmp_path / name)
    texts = {
        path: path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".json", ".jsonl", ".tsv", ".txt") and path.name != "answers.jsonl"
    }
    if name == "mme":
        texts = dict([*texts.items()][:3] + [*texts.items()][-1:])
    by_text = {text: path for path, text in texts.items()}

    def tagged(text):
        path = by_text[text]
        strategies = mutated_text([text], most=2)
        lines = text.splitlines()
        if path.suffix in (".json", ".jsonl"):
            is_lines = len(lines) > 1 and lines[0].endswith("}")  # POPE's JSON files too
            value = [json.loads(line) for line in lines] if is_lines else json.loads(text)
            strategies |= mutated_values([value], most=2).map(as_lines if is_lines else as_json)
        return strategies.map(lambda content: (path, content))

    def check(mutated):
        path, content = mutated
        path.write_bytes(content)
        try:
            for question in BENCHMARKS[name].load_questions(folder):
                json.dumps([question.question_id, question.official_id, question.prompt])
            return check_scores(name, folder, folder / "answers.jsonl")
        finally:
            path.write_text(texts[path])

    inputs = tagged(next(iter(by_text)))
    for text in [*by_text][1:]:
        inputs |= tagged(text)
    counts = fuzz(f"official files ({name})", inputs, check, SHARE)
    assert {"scored", "refused (BenchmarkError)"} <= set(counts)
