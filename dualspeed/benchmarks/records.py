"""What every benchmark shares: a question enters a model, an answer leaves it, a record says what it is worth."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from dualspeed.benchmarks.files import get_field, read_json_lines
from dualspeed.errors import BenchmarkError, UnknownAnswerError

# Stands in every score; changes when a prompt does, since scores under different prompts don't compare.
PROMPT_VERSION = "llava-1.5"
# How LLaVA asks for a short answer, and for an option's letter.
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
LETTER_ANSWER = "\nAnswer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Question:
    """One question as LLaVA puts it to a model."""

    question_id: str
    """Unique within the benchmark; the key of answers and records."""
    official_id: str | int
    """`question_id` of the official file and of LLaVA's answers file; MME gives both questions of an image the same."""
    image: Path | None
    prompt: str
    """LLaVA's prompt without the image mark that stands before it."""


@dataclass(frozen=True)
class Record:
    """One official question after scoring."""

    question_id: str
    score: float
    """What the official rule gives for the answer, in [0, 1]."""
    gold: str
    predicted: str
    """The answer as the official rule reads it."""
    category: str = ""
    unit: str = ""
    """What a bootstrap draws: the question, or the image where a metric pairs the questions of an image."""
    is_missing: bool = False
    others: Mapping[str, float] = field(default_factory=dict)
    """What other rules give, in [0, 1], by name: lmms_eval, say."""


@dataclass(frozen=True, kw_only=True)
class QuestionSet:
    """Questions that a model answers: plain functions, so that a new benchmark is a module with one of these."""

    name: str
    question_file: Callable[[Path], Path]
    """folder -> the file whose checksum a score carries."""
    load_questions: Callable[[Path], list[Question]]
    """folder -> questions in official order. Raises BenchmarkError."""
    answer_key: Callable[[dict, str], str]
    """line of an answers file in LLaVA's format, its place for errors -> `Question.question_id`."""
    repeats: bool = False
    """Whether official questions share a key; the second one has ` #2` behind it."""
    image_mark: str = ""
    """What LLaVA's answers file writes before the prompt of a question with an image."""


@dataclass(frozen=True, kw_only=True)
class ServerBenchmark(QuestionSet):
    """A test split whose answers only a server knows: here it is answered, and its submission file written."""

    submission: Callable[[Path, Mapping[str, str]], bytes]
    """folder, {question_id: text} -> the file's content. Raises BenchmarkError, UnknownAnswerError."""


@dataclass(frozen=True, kw_only=True)
class Benchmark(QuestionSet):
    """A benchmark that is scored here.

    `metrics` are percentages but for MME's points. `statistics` and `percent_from_sums` give `metrics[percent]` as a
    function of sums over units, so that a bootstrap of any size is one matrix product:
    `percent_from_sums(draws @ statistics(records))` with `draws` (samples, units).
    """

    headline: str
    """The metric that papers report."""
    percent: str
    """The metric on 0-100 that means are taken of."""
    score_answers: Callable[[Path, Mapping[str, str]], list[Record]]
    """folder, {question_id: text} -> one record per official question. Raises BenchmarkError, UnknownAnswerError."""
    metrics: Callable[[Sequence[Record]], dict[str, float]]
    statistics: Callable[[Sequence[Record]], np.ndarray]
    """records -> (units, m), units in the order of `unit_ids`."""
    percent_from_sums: Callable[[np.ndarray], np.ndarray]
    """(..., m) sums of statistics over units -> (...) percent."""
    headline_statistics: Callable[[Sequence[Record]], np.ndarray] | None = None
    """Likewise for a headline that is no percentage; None: `percent` is the headline."""
    headline_from_sums: Callable[[np.ndarray], np.ndarray] | None = None


def official_key(record: dict, place: str) -> str:
    """Key of a benchmark whose official ids are unique; one file may have them as int, the other as str."""
    return str(get_field(record, "question_id", (int, str), place))


def read_questions(path: Path, images: Path) -> list[Question]:
    """Questions of a file of LLaVA's own: question_id, image, text on each line."""
    questions = []
    for place, line in read_json_lines(path):
        key, image = official_key(line, place), images / get_field(line, "image", str, place)
        questions.append(Question(key, line["question_id"], image, get_field(line, "text", str, place)))
    reject_duplicates([question.question_id for question in questions], path)
    return questions


def unit_ids(records: Sequence[Record]) -> list[str]:
    """The distinct units in order of appearance, which is that of the official files and not of the answers."""
    return list(dict.fromkeys(record.unit for record in records))


def sum_by_unit(records: Sequence[Record], rows: Sequence[Sequence[float]]) -> np.ndarray:
    """Add up one row of numbers per record over each unit: (units, m)."""
    positions = {unit: position for position, unit in enumerate(unit_ids(records))}
    numbers = np.asarray(rows, dtype=np.float64)
    sums = np.zeros((len(positions), numbers.shape[1]))
    np.add.at(sums, [positions[record.unit] for record in records], numbers)
    return sums


def divide(numerator: ArrayLike, denominator: ArrayLike) -> np.ndarray:
    """Elementwise quotient that is 0 where the denominator is."""
    upper, lower = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    return np.divide(upper, lower, out=np.zeros_like(upper), where=lower != 0)


def accuracy(records: Sequence[Record]) -> float:
    """Share of right answers in percent; 0 without records."""
    return 100 * sum(record.score for record in records) / max(1, len(records))


def by_category(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """{category: {"accuracy" in percent, "num_questions"}} in order of appearance."""
    categories = dict.fromkeys(record.category for record in records)
    chosen = {name: [record for record in records if record.category == name] for name in categories}
    return {name: {"accuracy": accuracy(part), "num_questions": len(part)} for name, part in chosen.items()}


def accuracy_statistics(records: Sequence[Record]) -> np.ndarray:
    """Right answers and questions per unit: (units, 2)."""
    return sum_by_unit(records, [(record.score, 1) for record in records])


def accuracy_from_sums(sums: np.ndarray) -> np.ndarray:
    """Percentage of right answers from sums of `accuracy_statistics`: (..., 2) -> (...)."""
    return 100 * divide(sums[..., 0], sums[..., 1])


def other_accuracy(records: Sequence[Record], name: str) -> float:
    """Mean of what the rule `name` gives, in percent."""
    return 100 * sum(record.others[name] for record in records) / max(1, len(records))


def official_and_lmms_accuracy(records: Sequence[Record]) -> dict[str, float]:
    """Accuracy by the official rule, and by lmms-eval's."""
    return {"accuracy": accuracy(records), "accuracy_lmms_eval": other_accuracy(records, "lmms_eval")}


def number_repeats(keys: Iterable[str]) -> list[str]:
    """The keys with ` #2`, ` #3` and so on behind those that came before."""
    seen: Counter[str] = Counter()
    numbered = []
    for key in keys:
        seen[key] += 1
        numbered.append(key if seen[key] == 1 else f"{key} #{seen[key]}")
    return numbered


def reject_duplicates(ids: Sequence[str], place: str | Path) -> None:
    """Raise BenchmarkError if an id occurs twice in the file `place`."""
    seen: set[str] = set()
    for question_id in ids:
        if question_id in seen:
            raise BenchmarkError(f"{place}: question_id {question_id!r} occurs twice")
        seen.add(question_id)


def reject_unknown(answers: Mapping[str, str], known: Collection[str], place: str | Path) -> None:
    """Raise UnknownAnswerError if an answer belongs to no question of `place`."""
    unknown = [question_id for question_id in answers if question_id not in known]
    if unknown:
        count = f"{len(unknown)} of {len(answers)} answers are unknown"
        raise UnknownAnswerError(unknown[0], f"field 'question_id': {unknown[0]!r} is not in {place} ({count})")
