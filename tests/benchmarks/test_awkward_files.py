"""Official files and answers as programs and editors leave them: options like `None`, marks, old forms."""

import base64
import csv
import json
import subprocess
import sys

import openpyxl
import pytest

from dualspeed.benchmarks import BENCHMARKS, get_server_benchmark
from dualspeed.benchmarks.mmbench import parse_answer, parse_letter
from dualspeed.benchmarks.vizwiz import CURLY_CONTRACTIONS, official_score
from dualspeed.errors import BenchmarkError
from dualspeed.evaluation.scoring import score, submit
from tests.support import official
from tests.support.official_files import LETTER_ANSWER, write_image, write_lines
from tests.support.official_vqa import spread

TABLE, TEST_TABLE = "mmbench_dev_20230712.tsv", "mmbench_test_20230712.tsv"
ANSWERS = "answers.jsonl"
OPTIONS = ["None", "N/A", "nan", "null", "NULL", "#N/A", "7", "7.0", "1,000", "2023-07-12", "1/2", "TRUE", "-", "NaN"]


def score_command(name, folder, answers=ANSWERS):
    """Content of METRICS.json that `dualspeed score` writes."""
    command = [sys.executable, "-m", "dualspeed.cli", "score", name, "--data", str(folder)]
    command += ["--answers", str(folder / answers), "--out", str(folder / "metrics.json")]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads((folder / "metrics.json").read_text())


def write_table(folder, questions, name=TABLE):
    """MMBench's table: all rotations of questions that are given as (options, right one)."""
    folder.mkdir(parents=True, exist_ok=True)
    write_image(folder / "picture.jpg", 0)
    picture = base64.b64encode((folder / "picture.jpg").read_bytes()).decode()
    rows = []
    for number, (options, gold) in enumerate(questions):
        for rotation in range(len(options)):
            rotated = options[rotation:] + options[:rotation]
            cells = dict.fromkeys("ABCD", "") | dict(zip("ABCD", rotated, strict=False))
            row = {"index": number + 1_000_000 * rotation, "question": f"Which, {number}?", "hint": "nan"} | cells
            rows.append(row | {"answer": "ABCD"[rotated.index(gold)], "category": "x", "image": picture})
    with (folder / name).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return rows


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_that_looks_empty_or_like_a_number_is_shown_and_can_be_right(option, tmp_path):
    folder = tmp_path / "mmbench"
    rows = write_table(folder, [(["red", option, "blue"], option), ([option, "red"], "red")])
    asked = BENCHMARKS["mmbench"].load_questions(folder)
    assert asked[0].prompt == f"Which, 0?\nA. red\nB. {option}\nC. blue{LETTER_ANSWER}"
    assert asked[1].prompt == f"Which, 0?\nA. {option}\nB. blue\nC. red{LETTER_ANSWER}"
    assert asked[3].prompt == f"Which, 1?\nA. {option}\nB. red{LETTER_ANSWER}"
    for write in (lambda row: row["answer"], lambda row: row[row["answer"]]):  # the letter, then the option's text
        write_lines(folder / ANSWERS, [{"question_id": row["index"], "text": write(row)} for row in rows])
        result = score("mmbench", folder, folder / ANSWERS, folder / "metrics.json")
        assert result["score"] == result["metrics"]["accuracy_vlmevalkit"] == 100
    assert result["metrics"]["accuracy_letter"] == 0


def test_the_command_scores_an_option_none(tmp_path):
    rows = write_table(tmp_path, [(["Yes", "None"], "None")])
    write_lines(tmp_path / ANSWERS, [{"question_id": row["index"], "text": row["answer"]} for row in rows])
    assert score_command("mmbench", tmp_path)["score"] == 100


def test_the_servers_sheet_has_the_option_too(tmp_path):
    rows = write_table(tmp_path, [(["Yes", "None"], "None")], TEST_TABLE)
    write_lines(tmp_path / ANSWERS, [{"question_id": row["index"], "text": row["answer"]} for row in rows])
    submit("mmbench_test", tmp_path, tmp_path / ANSWERS, tmp_path / "out.xlsx")
    header, first, _ = openpyxl.load_workbook(tmp_path / "out.xlsx").active.iter_rows(values_only=True)
    shown = dict(zip(header, first, strict=True))
    assert (shown["A"], shown["B"], shown["C"], shown["prediction"]) == ("Yes", "None", None, "B")


def test_an_empty_option_between_others_has_no_letter_and_none_is_left_out_behind_it(tmp_path):
    write_table(tmp_path, [(["red", " ", "blue"], "blue")])
    asked = BENCHMARKS["mmbench"].load_questions(tmp_path)
    assert asked[0].prompt == f"Which, 0?\nA. red\nC. blue{LETTER_ANSWER}"


def test_a_right_answer_that_is_no_option_is_an_error(tmp_path):
    write_table(tmp_path, [(["red", "blue"], "red")])
    text = (tmp_path / TABLE).read_text()
    (tmp_path / TABLE).write_text(text.replace("\tA\tx", "\tD\tx"))
    write_lines(tmp_path / ANSWERS, [{"question_id": 0, "text": "A"}])
    with pytest.raises(BenchmarkError, match=r"\.tsv, line 2: field 'answer' is 'D'; valid: A, B"):
        score("mmbench", tmp_path, tmp_path / ANSWERS, tmp_path / "metrics.json")


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda text: text.replace("Which, 1?", '"Which, 1?', 1), r"line \d: a quote is opened and never closed"),
        (lambda text: text.replace("\tC\t", "\tA\t", 1), r"line 1: column 'A' is there twice"),
        (lambda text: text.replace("\n0\t", f"\n{'9' * 5000}\t"), r"line 2: field 'index' is '9"),
        (lambda text: text.replace("/9j/", "é", 1), r"line 2: field 'image' is not base64"),
    ],
)
def test_a_table_that_would_lose_rows_in_silence_is_refused(edit, message, tmp_path):
    write_table(tmp_path, [(["red", "blue"], "red"), (["red", "blue"], "blue")])
    (tmp_path / TABLE).write_text(edit((tmp_path / TABLE).read_text()))
    with pytest.raises(BenchmarkError, match=message):
        BENCHMARKS["mmbench"].load_questions(tmp_path)


@pytest.mark.parametrize(
    "text, letter, whole",
    [
        ("B", "B", "B"),
        ("the blue one", "", "B"),
        ("red or blue", "", ""),
        ("b", "", ""),
        ("Z", "", ""),
        ("Z, that is blue", "", ""),  # Z is VLMEvalKit's word for none of them
        ("Cannot determine the answer", "", ""),
        ("Cannot determine the answer: blue", "", ""),
        ("I can't process this file. B", "", ""),
        ("A blue B", "", "B"),  # two letters, one option
        ("blue " * 10, "", ""),  # longer than twice the options
        ("None", "", "C"),
    ],
)
def test_answers_are_read_as_by_vlmevalkits_exact_matching(text, letter, whole):
    options = {"A": "red", "B": "blue", "C": "None"}
    assert (parse_letter(text, options), parse_answer(text, options)) == (letter, whole)


@pytest.mark.parametrize("name", sorted(official.WRITERS))
def test_a_byte_order_mark_in_any_file_changes_nothing(name, tmp_path):
    folder = official.write_benchmark(name, tmp_path / name)
    expected = score(name, folder, folder / ANSWERS, folder / "metrics.json")
    asked = BENCHMARKS[name].load_questions(folder)
    (folder / "metrics.json").unlink()
    marked = [path for path in folder.rglob("*") if path.suffix in (".json", ".jsonl", ".tsv", ".txt")]
    assert len(marked) > 1
    for path in marked:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert BENCHMARKS[name].load_questions(folder) == asked
    assert score_command(name, folder) | {"checksum": ""} == expected | {"checksum": ""}


# (annotators' answers, answer, score by the official API of VizWiz).
CURLY = [
    ({"don't": 10}, "dont", 0),  # becomes don't with a curly apostrophe
    ({"don\u2019t": 10}, "dont", 1),
    ({"don't": 10}, "don't", 1),
    ({"it's": 10}, "its", 0),  # its is no word of the table, and stays
    ({"its": 10}, "its", 1),
    ({"that's soup": 10}, "thats soup", 0),
    ({"they\u2019re": 4, "dogs": 6}, "theyre", 1),
    ({"can't": 10}, "cant", 1),  # with a straight one in that table too
    ({"aren't": 10}, "arent", 1),
    ({"where's": 10}, "wheres", 1),
    ({"who've": 10}, "whove", 1),
    ({"we've": 10}, "weve", 1),
    ({"couldn\u2019t\u2019ve": 10}, "couldn'tve", 1),
    ({"couldnt've": 10}, "couldnt've", 1),  # the table's word has a curly one
    ({"somebody'd": 10}, "somebody'd", 1),
    ({"somebodyd": 10}, "somebody\u2019d", 1),
]


@pytest.mark.parametrize("counts, answer, expected", CURLY, ids=[answer for _, answer, _ in CURLY])
def test_vizwiz_has_its_own_table_of_contractions(counts, answer, expected):
    assert official_score(answer, spread(counts)) == expected


def test_vizwiz_alone_writes_curly_apostrophes():
    assert sum("\u2019" in whole for whole in CURLY_CONTRACTIONS.values()) > 100
    for name in ("vqav2", "textvqa"):
        assert "\u2019" not in str(vars(sys.modules[f"dualspeed.benchmarks.{name}"]))
    assert "\u2019" not in get_server_benchmark("vizwiz_test").submission.__globals__["evalai"]("dont")


def test_an_unanswered_question_of_vqav2_is_the_empty_answer_and_is_counted(tmp_path):
    folder = official.write_benchmark("vqav2", tmp_path / "vqav2")
    annotations = folder / "v2_mscoco_val2014_annotations.json"
    content = json.loads(annotations.read_text())
    given = dict(zip(("a", "the", "cat"), (2, 2, 6), strict=True))
    for number, answers in ((0, given), (1, {"cat": 10})):
        content["annotations"][number]["answers"] = [{"answer": answer} for answer in spread(answers)]
    annotations.write_text(json.dumps(content))
    lines = [json.loads(line) for line in (folder / ANSWERS).read_text().splitlines()]
    unanswered = {content["annotations"][number]["question_id"] for number in (0, 1)}
    write_lines(folder / ANSWERS, [line for line in lines if line["question_id"] not in unanswered])
    missing = score_command("vqav2", folder)
    empty = [{"question_id": question_id, "text": ""} for question_id in unanswered]
    write_lines(folder / ANSWERS, [*(line for line in lines if line["question_id"] not in unanswered), *empty])
    answered = score_command("vqav2", folder)
    assert [missing["per_question"][key] for key in ("262148000", "262148001")] == [1.0, 0.0]
    assert (missing["score"], missing["metrics"]) == (answered["score"], answered["metrics"])
    assert missing["num_missing"] == answered["num_missing"] + 2


def textvqa_answers(folder, forms):
    """Answers of TextVQA's questions with OCR tokens, each with the prompt of a form."""
    lines = [json.loads(line) for line in (folder / ANSWERS).read_text().splitlines()]
    with_ocr = [line for line in lines if "Reference OCR token" in line["prompt"]]
    for number, line in enumerate(with_ocr):
        question, ocr, request = line["prompt"].split("\n")
        line["prompt"] = forms[number % len(forms)].format(question=question, ocr=ocr, request=request)
    write_lines(folder / ANSWERS, with_ocr)


OLD_FORMS = [
    "OCR tokens: a, b. Question: {question} Short answer:",
    "{ocr}\n{question}\n{request}",
    "{question}\n{request}",
]


@pytest.mark.parametrize(
    "forms", [OLD_FORMS, OLD_FORMS[:1], OLD_FORMS[1:], [OLD_FORMS[2], "{question}\n{ocr}\n{request}"]]
)
def test_textvqa_counts_prompts_of_every_form_where_no_question_has_two(forms, tmp_path):
    """LLaVA's script reads each of these prompts, and scores the answer whichever it is."""
    folder = official.write_benchmark("textvqa", tmp_path / "textvqa")
    textvqa_answers(folder, forms)
    result = score_command("textvqa", folder)
    assert result["score"] == pytest.approx(official.METRICS["textvqa"]["accuracy_with_ocr"])
    assert result["metrics"]["num_answered"] == 40
    assert result["num_missing"] == 2


def test_textvqa_counts_answers_with_ocr_tokens_alone_where_a_question_has_both(tmp_path):
    folder = official.write_benchmark("textvqa", tmp_path / "textvqa")
    result = score_command("textvqa", folder)
    assert result["metrics"]["accuracy"] == result["metrics"]["accuracy_with_ocr"]
    assert result["metrics"]["accuracy_without_ocr"] != result["metrics"]["accuracy_with_ocr"]


@pytest.mark.parametrize(
    "name, file, content, message",
    [
        ("pope", ANSWERS, '{"question_id": ' + "9" * 5000 + "}", r"line 1: not readable as JSON \(Exceeds the limit"),
        ("gqa", "testdev_balanced_questions.json", "[" * 100_000, r"not readable as JSON \(maximum recursion depth"),
        (
            "seedbench",
            "SEED-Bench.json",
            '{"questions": [], "question_type": {"a": []}}',
            r"'question_type': field 'a' is \[\]",
        ),
        ("seedbench", ANSWERS, f'{{"question_id": "{"9" * 5000}", "text": "A"}}', r"line 1: field 'question_id': '9"),
    ],
)
def test_numbers_and_brackets_without_end_are_errors_of_the_file(name, file, content, message, tmp_path):
    folder = official.write_benchmark(name, tmp_path / name)
    (folder / file).write_text(content)
    with pytest.raises(BenchmarkError, match=message):
        score(name, folder, folder / ANSWERS, folder / "metrics.json")


def test_a_name_that_is_too_long_for_a_file_is_one_of_a_missing_image(tmp_path):
    folder = official.write_benchmark("mme", tmp_path / "mme")
    path = folder / "llava_mme.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(path, [lines[0] | {"image": "n" * 300}, *lines[1:]])
    asked = BENCHMARKS["mme"].load_questions(folder)
    assert asked[0].image.name == "n" * 300 and asked[1].image.is_file()
