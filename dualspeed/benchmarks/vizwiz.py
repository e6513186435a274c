"""VizWiz: val, which is scored here, and test, whose answers go to a server.

Files of val: val.json (official), images in val/. Files of test: llava_test.jsonl (questions with LLaVA's prompts),
images in test/. The id of a question of val in an answers file is its image's name, with or without ending, or the
number in that name; if there is a llava_val.jsonl, it is that file's question_id. The rule is that of the official API,
which normalises the model's answer but not those of the annotators; in its public copies most contractions are written
with a curly apostrophe, so that `dont` becomes an answer that equals no annotator's `don't`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from dualspeed.benchmarks.files import find_path, get_field, read_entries, read_json_lines
from dualspeed.benchmarks.records import (
    SHORT_ANSWER,
    Benchmark,
    Question,
    Record,
    ServerBenchmark,
    official_key,
    read_questions,
    reject_duplicates,
    reject_unknown,
)
from dualspeed.benchmarks.vqa_accuracy import (
    CONTRACTIONS,
    clean,
    evalai,
    leave_one_out,
    normalise_words,
    read_annotators,
    strip_punctuation,
)
from dualspeed.errors import BenchmarkError

NUMBERED_IMAGE = re.compile(r"VizWiz_val_([0-9]{1,18})")
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
PROMPT_END = UNANSWERABLE + SHORT_ANSWER
CURLY = str.maketrans("'", "\u2019")
# Of the official table: words whose contraction has a straight apostrophe all the same, and words written with one.
STRAIGHT_CONTRACTIONS = frozenset("aint arent cant couldve couldnt weve wheres whove".split())
STRAIGHT_WORDS = frozenset(("couldn'tve", "hadn'tve"))
CURLY_CONTRACTIONS = {
    word if word in STRAIGHT_WORDS else word.translate(CURLY): (
        whole if word in STRAIGHT_CONTRACTIONS else whole.translate(CURLY)
    )
    for word, whole in CONTRACTIONS.items()
}


def question_file(folder: Path) -> Path:
    """Official questions and answers of val."""
    return find_path(folder, "val.json", "Annotations/val.json")


def read_val(folder: Path) -> list[tuple[str, str, dict]]:
    """(place, image, entry) of each question of val."""
    path = question_file(folder)
    entries = [(place, get_field(entry, "image", str, place), entry) for place, entry in read_entries(path)]
    reject_duplicates([image for _, image, _ in entries], path)
    return entries


def load_questions(folder: Path) -> list[Question]:
    """Questions of val in official order, in the form of LLaVA's prompts for test."""
    images = find_path(folder, "val", "images")
    return [
        Question(Path(image).stem, image, images / image, get_field(entry, "question", str, place) + PROMPT_END)
        for place, image, entry in read_val(folder)
    ]


def answer_key(record: dict, place: str) -> str:
    """Name of the image without its ending."""
    return official_key(record, place).removesuffix(".jpg")


def by_image(folder: Path, answers: Mapping[str, str], known: set[str]) -> dict[str, str]:
    """{image name without its ending: answer}.

    Ids are translated by llava_val.jsonl, or, without that file, from a number to the image in `known` that has it.

    Raises:
        UnknownAnswerError: an answer belongs to no image.
    """
    path = folder / "llava_val.jsonl"
    if path.exists():
        images = {
            answer_key(line, place): Path(get_field(line, "image", str, place)).stem
            for place, line in read_json_lines(path)
        }
    else:
        images = {str(int(found[1])): found[0] for found in map(NUMBERED_IMAGE.fullmatch, known) if found}
    reject_unknown(answers, known | images.keys(), question_file(folder))
    return {images.get(key, key): text for key, text in answers.items()}


def official_score(answer: str, annotators: Sequence[str]) -> float:
    """Score of one answer by the official API."""
    return leave_one_out(normalise_words(strip_punctuation(clean(answer)), CURLY_CONTRACTIONS), annotators)


def lmms_score(answer: str, annotators: Sequence[str]) -> float:
    """Score of one answer by lmms-eval, which normalises both sides."""
    return leave_one_out(evalai(answer), [evalai(other) for other in annotators])


def score_answers(folder: Path, answers: Mapping[str, str]) -> list[Record]:
    """One record per question of val. A missing answer scores 0; the official script would stop at it."""
    entries = read_val(folder)
    answers = by_image(folder, answers, {Path(image).stem for _, image, _ in entries})
    records = []
    for place, image, entry in entries:
        key, annotators = Path(image).stem, read_annotators(entry, place)
        answer, is_missing = answers.get(key, ""), key not in answers
        score = 0.0 if is_missing else official_score(answer, annotators)
        others = {"lmms_eval": 0.0 if is_missing else lmms_score(answer, annotators)}
        gold, category = max(annotators, key=annotators.count), get_field(entry, "answer_type", str, place)
        records.append(Record(key, score, gold, answer, category, is_missing=is_missing, other_scores=others))
    return records


def test_file(folder: Path) -> Path:
    """LLaVA's question file of test."""
    return find_path(folder, "llava_test.jsonl")


def load_test_questions(folder: Path) -> list[Question]:
    """Questions of test in the order of LLaVA's file."""
    return read_questions(test_file(folder), find_path(folder, "test", "images"))


def submission(folder: Path, answers: Mapping[str, str]) -> bytes:
    """JSON list for the server: image and answer of every question, in the order of LLaVA's file."""
    path, entries = test_file(folder), []
    lines = read_json_lines(path)
    reject_unknown(answers, {official_key(line, place) for place, line in lines}, path)
    for place, line in lines:
        key = official_key(line, place)
        if key not in answers:
            raise BenchmarkError(f"{place}: question_id {key!r} has no answer; the server wants one to each question")
        entries.append({"image": get_field(line, "image", str, place), "answer": evalai(answers[key])})
    return json.dumps(entries).encode()


VIZWIZ = Benchmark(
    name="vizwiz",
    question_file=question_file,
    load_questions=load_questions,
    answer_key=answer_key,
    score_answers=score_answers,
)
VIZWIZ_TEST = ServerBenchmark(
    name="vizwiz_test",
    question_file=test_file,
    load_questions=load_test_questions,
    submission=submission,
)
