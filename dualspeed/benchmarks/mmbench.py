"""MMBench in English and Chinese: multiple choice, each question asked in every rotation of its options.

A question is right only if the answers to all rotations are.

Files: mmbench_dev_20230712.tsv and mmbench_dev_cn_20231003.tsv (official, with the images in the table), and those of
test, whose answers go to a server. Each rotation is a row, whose index is the question's plus a multiple of 1,000,000.
There is no judge: the rule is VLMEvalKit's exact_matching. Exactly one option's letter must be among the words of an
answer, and there among the last four; where there is no such letter, the answer must hold the text of exactly one
option. Images are written to images/ beside the table when questions are loaded.

Cells of options are text here: an option `None` or `N/A` is shown and can be right. LLaVA's loader (pandas) takes it
for an empty cell and leaves out this option and those behind it.
"""

import base64
import csv
import hashlib
import io
import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from dualspeed.benchmarks.files import find_path, get_choice, read_text
from dualspeed.benchmarks.records import (
    LETTER_ANSWER,
    Benchmark,
    Question,
    Record,
    ServerBenchmark,
    reject_duplicates,
    reject_unknown,
)
from dualspeed.errors import BenchmarkError
from dualspeed.files import write_atomic

OPTIONS = ("A", "B", "C", "D")
INDEX = re.compile("[0-9]{1,18}")
ROTATION = 1_000_000
LAST_WORDS = 4
LETTER_ANSWER_CN = "\n请直接回答选项字母。"
# Cells that are empty to pandas, with which LLaVA reads the table; LLaVA adds nan and none in upper or lower case.
EMPTY = frozenset(
    "#N/A #NA -1.#IND -1.#QNAN -NaN -nan 1.#IND 1.#QNAN <NA> N/A NA NULL NaN None n/a nan null".split()
) | {"", "#N/A N/A"}
# Sentences by which VLMEvalKit knows that a model refused to answer, whatever else it said.
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
NOT_WORDS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
LONGEST_REFERENCE = 64
NOT_SUBMITTED = ("hint", "category", "source", "image", "comment", "l2-category")
PREDICTION_COLUMN = 6

DEV = ("mmbench_dev_20230712.tsv", "mmbench_dev_en_20231003.tsv")
DEV_CN = ("mmbench_dev_cn_20231003.tsv",)
TEST = ("mmbench_test_20230712.tsv", "mmbench_test_en_20231003.tsv")
TEST_CN = ("mmbench_test_cn_20231003.tsv",)


def question_file(names: Sequence[str], folder: Path) -> Path:
    """Official table."""
    return find_path(folder, *names)


def read_rows(path: Path, *columns: str) -> list[tuple[str, dict[str, str]]]:
    """(place, row) of the table; it must have `columns` beside index, question and options."""
    (_, header), *lines = read_table(path)
    for column in ("index", "question", "A", "B", *columns):
        if column not in header:
            raise BenchmarkError(f"{path}, line 1: there is no column {column!r}")
    if repeated := next((column for column in header if header.count(column) > 1), None):
        raise BenchmarkError(f"{path}, line 1: column {repeated!r} is there twice")
    rows = []
    for number, fields in lines:
        place = f"{path}, line {number}"
        if len(fields) != len(header):
            raise BenchmarkError(f"{place}: {len(fields)} fields, expected {len(header)}; is the file truncated?")
        row = dict(zip(header, fields, strict=True))
        if not INDEX.fullmatch(row["index"]):
            raise BenchmarkError(f"{place}: field 'index' is {row['index']!r}, expected a number")
        rows.append((place, row))
    reject_duplicates([row["index"] for _, row in rows], path)
    return rows


def read_table(path: Path) -> list[tuple[int, list[str]]]:
    """(number of its last line, fields) of each row of the table, as text; blank lines are no rows."""
    csv.field_size_limit(sys.maxsize)
    # The last row shows that no quote is open: one that is never closed would swallow the rows behind it.
    end = ["end of the table"]
    reader = csv.reader(io.StringIO(f"{read_text(path)}\n{end[0]}", newline=""), delimiter="\t")
    try:
        *rows, last = [(reader.line_num, fields) for fields in reader if fields]
    except csv.Error as error:
        raise BenchmarkError(f"{path}, line {reader.line_num}: not a tab-separated table ({error})") from error
    if last[1] != end:
        start = rows[-1][0] + 1 if rows else 1
        raise BenchmarkError(f"{path}, line {start}: a quote is opened and never closed; is the file truncated?")
    return rows


def is_empty(cell: str) -> bool:
    """True if LLaVA reads a hint as empty."""
    return cell in EMPTY or cell.lower() in ("nan", "none")


def get_options(row: Mapping[str, str]) -> dict[str, str]:
    """{letter: text} up to the last option that isn't empty; of empty ones before it there is no letter."""
    return {letter: row[letter] for letter in OPTIONS if row.get(letter, "").strip()}


def make_prompt(row: Mapping[str, str], request: str) -> str:
    """LLaVA's prompt: hint, question, options and request, one a line."""
    hint = row.get("hint", "")
    lines = [] if is_empty(hint) else [hint]
    lines += [row["question"], *(f"{letter}. {text}" for letter, text in get_options(row).items())]
    return "\n".join(lines) + request


def write_image(content: str, folder: Path, place: str) -> Path:
    """Write the image of a base64 cell unless its file exists; equal images share a file."""
    path = folder / f"{hashlib.sha256(content.encode()).hexdigest()[:20]}.jpg"
    if not path.exists():
        try:
            write_atomic(path, base64.b64decode(content, validate=True))
        except ValueError as error:
            raise BenchmarkError(f"{place}: field 'image' is not base64 ({error}); is the file truncated?") from error
        except OSError as error:
            raise BenchmarkError(
                f"{folder}: cannot be written to, but images of the table go there: {error}"
            ) from error
    return path


def load_questions(names: Sequence[str], request: str, folder: Path) -> list[Question]:
    """One question per row of the table: every rotation of every question."""
    rows = read_rows(question_file(names, folder), "image")
    by_index = {row["index"]: row for _, row in rows}
    questions = []
    for place, row in rows:
        content = row["image"]
        # Newer tables hold an image once; other rows have the index of its row.
        if len(content) <= LONGEST_REFERENCE and content in by_index:
            content = by_index[content]["image"]
        image = write_image(content, folder / "images", place)
        questions.append(Question(row["index"], int(row["index"]), image, make_prompt(row, request)))
    return questions


def parse_letter(text: str, options: Mapping[str, str]) -> str:
    """Option that a text names by its letter, "" if none or not clear."""
    words = text.translate(NOT_WORDS).split()
    named = [letter for letter in options if letter in words]
    is_clear = len(named) == 1 and words.index(named[0]) >= len(words) - LAST_WORDS
    return named[0] if is_clear and not is_refusal(text) else ""


def is_refusal(text: str) -> bool:
    """True for an answer that VLMEvalKit reads as Z, none of the options."""
    return any(sentence in text for sentence in REFUSALS)


def parse_answer(text: str, options: Mapping[str, str]) -> str:
    """Option that a text names by its letter or else by its words: VLMEvalKit's reading without a judge."""
    letter, words = parse_letter(text, options), text.translate(NOT_WORDS).split()
    says_none = is_refusal(text) or ("Z" in words and not any(option in words for option in options))
    if letter or says_none or len(text) > 2 * sum(map(len, options.values())):
        return letter
    named = [letter for letter, option in options.items() if option.lower() in text.lower()]
    return named[0] if len(named) == 1 else ""


def score_answers(names: Sequence[str], folder: Path, answers: Mapping[str, str]) -> list[Record]:
    """One record per question, right if every rotation is. A missing answer is wrong."""
    path = question_file(names, folder)
    rows = read_rows(path, "answer")
    reject_unknown(answers, {row["index"] for _, row in rows}, path)
    groups: dict[str, list[tuple[str, dict[str, str]]]] = {}
    for place, row in rows:
        groups.setdefault(str(int(row["index"]) % ROTATION), []).append((place, row))
    records = []
    for index, group in groups.items():
        options = [get_options(row) for _, row in group]
        golds = [
            get_choice(row, "answer", tuple(each), place) for (place, row), each in zip(group, options, strict=True)
        ]
        texts = [answers.get(row["index"], "") for _, row in group]
        read = [parse_answer(text, each) for text, each in zip(texts, options, strict=True)]
        score = float(read == golds)
        others = {
            "vlmevalkit": score,
            "letter": float([parse_letter(*each) for each in zip(texts, options, strict=True)] == golds),
            "first_rotation": float(read[0] == golds[0]),
        }
        is_missing = any(row["index"] not in answers for _, row in group)
        category = group[0][1].get("l2-category") or group[0][1].get("category", "")
        gold, predicted = " ".join(golds), " ".join(letter or "?" for letter in read)
        records.append(Record(index, score, gold, predicted, category, is_missing=is_missing, other_scores=others))
    return records


def submission(names: Sequence[str], folder: Path, answers: Mapping[str, str]) -> bytes:
    """Excel sheet for the server in LLaVA's format; needs openpyxl."""
    from openpyxl import Workbook
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    path = question_file(names, folder)
    rows = read_rows(path)
    reject_unknown(answers, {row["index"] for _, row in rows}, path)
    columns = [column for column in rows[0][1] if column not in NOT_SUBMITTED]
    columns.insert(PREDICTION_COLUMN, "prediction")
    sheet = Workbook(write_only=False).active
    sheet.append(columns)
    for number, (_, row) in enumerate(rows, start=2):
        cells = row | {"prediction": answers.get(row["index"], "")}
        for position, column in enumerate(columns, start=1):
            text = ILLEGAL_CHARACTERS_RE.sub("", cells[column])
            if text:
                cell = sheet.cell(number, position)
                # With its type, so that a text that begins with = is no formula.
                cell.value, cell.data_type = (int(text), "n") if column == "index" else (text, "s")
    content = io.BytesIO()
    sheet.parent.save(content)
    return content.getvalue()


def make_benchmark(name: str, files: Sequence[str], request: str) -> Benchmark:
    """Benchmark on a split of dev."""
    return Benchmark(
        name=name,
        question_file=partial(question_file, files),
        load_questions=partial(load_questions, files, request),
        score_answers=partial(score_answers, files),
    )


def make_server_benchmark(name: str, files: Sequence[str], request: str) -> ServerBenchmark:
    """Test split, which a server scores."""
    return ServerBenchmark(
        name=name,
        question_file=partial(question_file, files),
        load_questions=partial(load_questions, files, request),
        submission=partial(submission, files),
    )


MMBENCH = make_benchmark("mmbench", DEV, LETTER_ANSWER)
MMBENCH_CN = make_benchmark("mmbench_cn", DEV_CN, LETTER_ANSWER_CN)
MMBENCH_TEST = make_server_benchmark("mmbench_test", TEST, LETTER_ANSWER)
MMBENCH_CN_TEST = make_server_benchmark("mmbench_cn_test", TEST_CN, LETTER_ANSWER_CN)
