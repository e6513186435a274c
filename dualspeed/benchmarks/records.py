"""Types and helpers that all benchmarks share: questions for a model, and records with the scores of its answers."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from dualspeed.benchmarks.files import get_field, read_json_lines
from dualspeed.errors import BenchmarkError, UnknownAnswerError

# Part of every score; it changes with any prompt, since scores under different prompts can't be compared.
PROMPT_VERSION = "llava-1.5"
# LLaVA's request for a short answer, and for the letter of an option.
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
LETTER_ANSWER = "\nAnswer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Question:
    """One question with LLaVA's prompt."""

    question_id: str
    """Key of answers and records, unique within the benchmark."""
    official_id: str | int
    """`question_id` of the official file and of LLaVA's answers file; both questions of an image share it in MME."""
    image: Path | None
    """File of the image; None for a question on text alone."""
    prompt: str
    """LLaVA's prompt without the image placeholder that precedes it."""


@dataclass(frozen=True)
class Record:
    """Score of one official question."""

    question_id: str
    """`Question.question_id`."""
    score: float
    """Score by the official rule, in [0, 1]."""
    gold: str
    """Right answer."""
    predicted: str
    """The model's answer as the official rule reads it."""
    category: str = ""
    """Type of question, "" if the benchmark has none."""
    image_id: str = ""
    """Image, where a metric pairs the questions of an image; "" elsewhere."""
    is_missing: bool = False
    """True if the model gave no answer."""
    other_scores: Mapping[str, float] = field(default_factory=dict)
    """Scores by other rules, in [0, 1]; keys are the rules' names, such as lmms_eval."""

    @property
    def unit(self) -> str:
        """Id of the unit that a bootstrap draws: the image if questions are paired by it, else the question."""
        return self.image_id or self.question_id


def official_key(record: dict, place: str) -> str:
    """Key of a line's question where official ids are unique; one file may hold them as int, another as str."""
    return str(get_field(record, "question_id", (int, str), place))


def unit_ids(records: Sequence[Record]) -> list[str]:
    """Distinct units in order of appearance, which is that of the official files and not of the answers."""
    return list(dict.fromkeys(record.unit for record in records))


def sum_by_unit(records: Sequence[Record], rows: Sequence[Sequence[float]] | np.ndarray) -> np.ndarray:
    """Sum rows of numbers, one (m,) row per record, over each unit: (units, m)."""
    positions = {unit: position for position, unit in enumerate(unit_ids(records))}
    numbers = np.asarray(rows, dtype=np.float64)
    sums = np.zeros((len(positions), numbers.shape[1]))
    np.add.at(sums, [positions[record.unit] for record in records], numbers)
    return sums


def divide(numerator: ArrayLike, denominator: ArrayLike) -> np.ndarray:
    """Elementwise quotient; 0 where the denominator is 0."""
    upper, lower = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    return np.divide(upper, lower, out=np.zeros_like(upper), where=lower != 0)


def accuracy(records: Sequence[Record]) -> float:
    """Mean score in percent; 0 without records."""
    return 100 * sum(record.score for record in records) / max(1, len(records))


def other_accuracy(records: Sequence[Record], rule: str) -> float:
    """Mean score by the other rule `rule`, in percent; 0 without records."""
    return 100 * sum(record.other_scores[rule] for record in records) / max(1, len(records))


def accuracy_by_rule(records: Sequence[Record]) -> dict[str, float]:
    """Accuracy by the official rule, and `accuracy_<rule>` by each other rule of the first record."""
    rules = records[0].other_scores if records else {}
    return {"accuracy": accuracy(records)} | {f"accuracy_{rule}": other_accuracy(records, rule) for rule in rules}


def answered_accuracy(records: Sequence[Record]) -> dict[str, float]:
    """Accuracy over answered questions, as some official scripts have it, and with missing answers as wrong ones."""
    answered = [record for record in records if not record.is_missing]
    return {"accuracy": accuracy(answered), "accuracy_missing_wrong": accuracy(records)}


def by_category(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """{category: {"accuracy" in percent, "num_questions"}} in order of appearance."""
    categories = dict.fromkeys(record.category for record in records)
    chosen = {name: [record for record in records if record.category == name] for name in categories}
    return {name: {"accuracy": accuracy(part), "num_questions": len(part)} for name, part in chosen.items()}


def accuracy_statistics(records: Sequence[Record]) -> np.ndarray:
    """Sum of scores and number of questions per unit: (units, 2)."""
    return sum_by_unit(records, [(record.score, 1) for record in records])


def answered_statistics(records: Sequence[Record]) -> np.ndarray:
    """Sum of scores and number of answered questions per unit: (units, 2)."""
    return sum_by_unit(records, [(record.score, not record.is_missing) for record in records])


def accuracy_from_sums(sums: np.ndarray) -> np.ndarray:
    """Accuracy in percent from sums of either statistics above: (..., 2) -> (...)."""
    return 100 * divide(sums[..., 0], sums[..., 1])


@dataclass(frozen=True, kw_only=True)
class QuestionSet:
    """Questions that a model answers, as a record of plain functions."""

    name: str
    """Key in `BENCHMARK_TABLE`."""
    question_file: Callable[[Path], Path]
    """folder -> file of the questions, whose checksum is part of a score."""
    load_questions: Callable[[Path], list[Question]]
    """folder -> questions in official order. Raises BenchmarkError."""
    answer_key: Callable[[dict, str], str] = official_key
    """line of an answers file in LLaVA's format, its place for errors -> `Question.question_id`."""
    has_repeats: bool = False
    """True if official questions may share a key; ` #2` is appended to the second one's."""
    image_placeholder: str = ""
    """Text that LLaVA's answers file has before the prompt of a question with an image."""


@dataclass(frozen=True, kw_only=True)
class ServerBenchmark(QuestionSet):
    """Test split whose answers only a server knows: we answer it and write the server's file."""

    submission: Callable[[Path, Mapping[str, str]], bytes]
    """folder, {question_id: text} -> content of the server's file. Raises BenchmarkError, UnknownAnswerError."""


@dataclass(frozen=True, kw_only=True)
class Benchmark(QuestionSet):
    """Benchmark that is scored here; the defaults are those of plain accuracy.

    `metrics` are percentages, except MME's points. `statistics` and `percent_from_sums` give `metrics[percent]` as a
    function of sums over units, so that a bootstrap of any size is one matrix product:
    `percent_from_sums(draws @ statistics(records))` with `draws` (samples, units).
    """

    score_answers: Callable[[Path, Mapping[str, str]], list[Record]]
    """folder, {question_id: text} -> one record per official question. Raises BenchmarkError, UnknownAnswerError."""
    metrics: Callable[[Sequence[Record]], dict[str, float]] = accuracy_by_rule
    """records -> all metrics by name."""
    headline: str = "accuracy"
    """Metric that papers report."""
    percent: str = "accuracy"
    """Metric on 0-100 that means over benchmarks are taken of."""
    statistics: Callable[[Sequence[Record]], np.ndarray] = accuracy_statistics
    """records -> (units, m), units in the order of `unit_ids`."""
    percent_from_sums: Callable[[np.ndarray], np.ndarray] = accuracy_from_sums
    """(..., m) sums of statistics over units -> (...) percent."""
    headline_statistics: Callable[[Sequence[Record]], np.ndarray] | None = None
    """`statistics` of a headline that is no percentage; None: `percent` is the headline."""
    headline_from_sums: Callable[[np.ndarray], np.ndarray] | None = None
    """(..., m) sums of headline_statistics -> (...) headline."""


def read_questions(path: Path, images: Path) -> list[Question]:
    """Questions of a file in LLaVA's format, with question_id, image (a file in `images`) and text on each line."""
    questions = []
    for place, line in read_json_lines(path):
        key, image = official_key(line, place), images / get_field(line, "image", str, place)
        questions.append(Question(key, line["question_id"], image, get_field(line, "text", str, place)))
    reject_duplicates([question.question_id for question in questions], path)
    return questions


def number_repeats(keys: Iterable[str]) -> list[str]:
    """Keys with ` #2`, ` #3` and so on appended to repeats."""
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
    """Raise UnknownAnswerError if an answer belongs to no question of the file `place`, whose ids are `known`."""
    unknown = [question_id for question_id in answers if question_id not in known]
    if unknown:
        count = f"{len(unknown)} of {len(answers)} answers are unknown"
        raise UnknownAnswerError(unknown[0], f"field 'question_id': {unknown[0]!r} is not in {place} ({count})")
