"""Files for servers: every question of the server's question file, in its order and the server's format."""

import csv
import json

import pytest
from openpyxl import load_workbook

from dualspeed.benchmarks import SERVER_BENCHMARKS, get_benchmark
from dualspeed.errors import BenchmarkError
from dualspeed.evaluation.scoring import submit
from tests.support import official
from tests.support.official_files import SHORT_ANSWER, write_lines


def test_vqav2_wants_the_whole_test_with_empty_answers_where_none_was_asked(tmp_path):
    whole = [{"question_id": number, "image": f"{number}.jpg", "text": "What?" + SHORT_ANSWER} for number in range(6)]
    write_lines(tmp_path / "llava_vqav2_mscoco_test2015.jsonl", whole)
    write_lines(tmp_path / "llava_vqav2_mscoco_test-dev2015.jsonl", whole[2:5])
    (tmp_path / "test2015").mkdir()
    asked = SERVER_BENCHMARKS["vqav2_test"].load_questions(tmp_path)
    assert [question.official_id for question in asked] == [2, 3, 4]
    texts = {4: "Two dogs.", 2: "women's", 3: "red,white"}
    write_lines(tmp_path / "answers.jsonl", [{"question_id": key, "text": text} for key, text in texts.items()])
    submit("vqav2_test", tmp_path, tmp_path / "answers.jsonl", tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == [
        {"question_id": 0, "answer": ""},
        {"question_id": 1, "answer": ""},
        {"question_id": 2, "answer": "women 's"},
        {"question_id": 3, "answer": "redwhite"},
        {"question_id": 4, "answer": "2 dogs"},
        {"question_id": 5, "answer": ""},
    ]


def test_vizwiz_wants_an_answer_to_every_image(tmp_path):
    lines = [{"question_id": number, "image": f"VizWiz_test_{number:08d}.jpg", "text": "What?"} for number in range(3)]
    write_lines(tmp_path / "llava_test.jsonl", lines)
    answers = [{"question_id": number, "text": "Unanswerable."} for number in (2, 0, 1)]
    write_lines(tmp_path / "answers.jsonl", answers)
    submit("vizwiz_test", tmp_path, tmp_path / "answers.jsonl", tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == [
        {"image": f"VizWiz_test_{number:08d}.jpg", "answer": "unanswerable"} for number in range(3)
    ]
    write_lines(tmp_path / "answers.jsonl", answers[:2])
    with pytest.raises(BenchmarkError, match=r"llava_test\.jsonl, line 2: question_id '1' has no answer"):
        submit("vizwiz_test", tmp_path, tmp_path / "answers.jsonl", tmp_path / "out.json")


def test_mmbench_wants_a_sheet_with_a_prediction_beside_the_options(tmp_path):
    folder = official.write_benchmark("mmbench", tmp_path / "mmbench")
    with (folder / "mmbench_dev_20230712.tsv").open(newline="") as file:
        header, *rows = list(csv.reader(file, delimiter="\t"))
    kept = [position for position, name in enumerate(header) if name != "answer"]
    with (folder / "mmbench_test_20230712.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([[row[place] for place in kept] for row in [header, *rows]])
    answers = [{"question_id": int(row[0]), "text": f"=A{number}\x07"} for number, row in enumerate(rows)][1:]
    write_lines(folder / "answers.jsonl", answers[::-1])
    submit("mmbench_test", folder, folder / "answers.jsonl", tmp_path / "out.xlsx")
    first, *lines = load_workbook(tmp_path / "out.xlsx").active.iter_rows(values_only=True)
    assert first == ("index", "question", "A", "B", "C", "D", "prediction", "split")
    assert lines[0] == (0, "Which colour, 0?", "red", "blue", "green", "black", None, "dev")
    assert [(line[0], line[6]) for line in lines[1:]] == [(one["question_id"], one["text"][:-1]) for one in answers]
    assert {line[4] for line in lines if line[0] == 17} == {None}


def test_a_test_split_is_scored_by_its_server_only():
    with pytest.raises(BenchmarkError, match="only a server can score vqav2_test; `dualspeed submit vqav2_test`"):
        get_benchmark("vqav2_test")
