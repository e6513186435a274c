"""MME: two yes-no questions per image, one of each answer; accuracy and accuracy+ (both right) summed over categories.

Files: the official release, MME_Benchmark_release_version/<category>/ with <name>.txt (question, tab, Yes or No; two
lines) beside <name>.png|jpg, or apart in questions_answers_YN/ and images/; and llava_mme.jsonl, LLaVA's prompts. The
rules are LLaVA's convert_answer_to_mme.py and the official calculation.py, but the questions of an image are paired
by the image instead of by line.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from dualspeed.benchmarks.files import BenchmarkError, find_path, get_field, read_json_lines, read_text
from dualspeed.benchmarks.records import (
    Benchmark,
    Question,
    Record,
    accuracy,
    accuracy_from_sums,
    accuracy_statistics,
    reject_duplicates,
    reject_unknown,
)

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
# LLaVA's prompt puts the second in the place of the first.
REQUESTS = ("Please answer yes or no.", "Answer the question using a single word or phrase.")


def question_file(folder: Path) -> Path:
    """LLaVA's question file."""
    return find_path(folder, "llava_mme.jsonl")


def release_folder(folder: Path) -> Path:
    """The folder that holds the categories: `folder` or the official release in it, whose depth differs by release."""
    release = folder / "MME_Benchmark_release_version"
    for candidate in (release / "MME_Benchmark", release, folder):
        if any((candidate / category).is_dir() for category in PERCEPTION + COGNITION):
            return candidate
    raise BenchmarkError(f"{release}: holds no category; valid: {', '.join(PERCEPTION + COGNITION)}")


def make_key(category: str, name: str, text: str) -> str:
    """Id of one of an image's two questions: category, file name without ending, and the question's own words."""
    for request in REQUESTS:
        text = text.replace(request, "")
    return f"{category}/{name}: {' '.join(text.split())}"


def answer_key(record: dict, place: str) -> str:
    """Id of the question that a line of answers belongs to: both of an image have its name for `question_id`."""
    return key_of(get_field(record, "question_id", str, place), get_field(record, "prompt", str, place))


def key_of(official_id: str, prompt: str) -> str:
    """`make_key` of LLaVA's question_id (category/image or category/images/image) and prompt."""
    path = PurePosixPath(official_id)
    return make_key(path.parts[0], path.stem, prompt)


def load_questions(folder: Path) -> list[Question]:
    """Questions in the order of LLaVA's file."""
    release = release_folder(folder)
    questions = []
    for place, line in read_json_lines(question_file(folder)):
        official_id, prompt = get_field(line, "question_id", str, place), get_field(line, "text", str, place)
        image = release / get_field(line, "image", str, place)
        if not image.exists():
            image = image.parent / "images" / image.name
        questions.append(Question(key_of(official_id, prompt), official_id, image, prompt))
    reject_duplicates([question.question_id for question in questions], question_file(folder))
    return questions


def read_labels(folder: Path) -> dict[str, tuple[str, str, str]]:
    """Official answers: question id -> (category, image, yes or no), images in alphabetic order."""
    labels: dict[str, tuple[str, str, str]] = {}
    release = release_folder(folder)
    for category in PERCEPTION + COGNITION:
        texts = release / category / "questions_answers_YN"
        for path in sorted((texts if texts.is_dir() else release / category).glob("*.txt")):
            lines = [line for line in read_text(path).split("\n") if line.strip()]
            if len(lines) != 2:
                raise BenchmarkError(f"{path}: has {len(lines)} questions, expected 2")
            for number, line in enumerate(lines, start=1):
                question, _, answer = line.strip().partition("\t")
                if answer not in ("Yes", "No"):
                    raise BenchmarkError(f"{path}, line {number}: answer is {answer!r} after the tab; valid: Yes, No")
                key = make_key(category, path.stem, question)
                if key in labels:
                    raise BenchmarkError(f"{path}, line {number}: the question occurs twice")
                labels[key] = (category, f"{category}/{path.stem}", answer.lower())
    if not labels:
        raise BenchmarkError(f"{release}: there is no <category>/*.txt")
    return labels


def parse_answer(text: str) -> str:
    """yes, no or other, by the first four characters."""
    start = text.lower()[:4]
    if "yes" in start:
        return "yes"
    return "no" if "no" in start else "other"


def score_answers(folder: Path, answers: Mapping[str, str]) -> list[Record]:
    """One record per official question; a missing answer counts as wrong."""
    labels = read_labels(folder)
    reject_unknown(answers, labels, release_folder(folder))
    records = []
    for key, (category, image, gold) in labels.items():
        is_missing = key not in answers
        predicted = "other" if is_missing else parse_answer(answers[key])
        records.append(Record(key, float(predicted == gold), gold, predicted, category, image, is_missing))
    return records


def accuracy_plus(records: Sequence[Record]) -> float:
    """Share of images with both questions right, in percent."""
    sums = accuracy_statistics(records)
    return 100 * float((sums[:, 0] == sums[:, 1]).mean()) if len(sums) else 0.0


def metrics(records: Sequence[Record]) -> dict[str, float]:
    """Points of perception and cognition (acc + acc+ of each category), both rates over all, points per category.

    A release without any category of cognition has no such metric.
    """
    points = {}
    for category in PERCEPTION + COGNITION:
        chosen = [record for record in records if record.category == category]
        if chosen:
            points[category] = accuracy(chosen) + accuracy_plus(chosen)
    result = {"perception": sum(points.get(category, 0.0) for category in PERCEPTION)}
    if not points.keys().isdisjoint(COGNITION):
        result["cognition"] = sum(points.get(category, 0.0) for category in COGNITION)
    result |= {"acc": accuracy(records), "acc_plus": accuracy_plus(records)}
    return result | {f"points_{category}": value for category, value in points.items()}


MME = Benchmark(
    name="mme",
    headline="perception",
    percent="acc",
    question_file=question_file,
    load_questions=load_questions,
    answer_key=answer_key,
    score_answers=score_answers,
    metrics=metrics,
    statistics=accuracy_statistics,
    percent_from_sums=accuracy_from_sums,
)
