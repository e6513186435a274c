"""Official files of VQAv2, VizWiz, TextVQA, MMBench and SEED-Bench: their questions, and errors in the files."""

import json
import subprocess
import sys

import pytest

from dualspeed.benchmarks import BENCHMARKS
from dualspeed.errors import BenchmarkError
from dualspeed.evaluation.scoring import score
from tests.support import official
from tests.support.edits import cut, edit_line, edit_value
from tests.support.official_files import LETTER_ANSWER, SHORT_ANSWER, write_lines

VQA_QUESTIONS, VQA_ANSWERS = "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"
TEXT_FILE, MMB_FILE, ANSWERS = "TextVQA_0.5.1_val.json", "mmbench_dev_20230712.tsv", "answers.jsonl"


def ask(name, folder):
    return BENCHMARKS[name].load_questions(official.write_benchmark(name, folder))


def test_questions_are_put_as_llava_puts_them(tmp_path):
    vqav2 = ask("vqav2", tmp_path / "vqav2")[1]
    assert (vqav2.official_id, vqav2.prompt) == (262148001, "What is it, 1?" + SHORT_ANSWER)
    assert vqav2.image.name == "COCO_val2014_000000262149.jpg"
    vizwiz = ask("vizwiz", tmp_path / "vizwiz")[2]
    request = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    assert (vizwiz.official_id, vizwiz.prompt) == (
        "VizWiz_val_00000002.jpg",
        f"What is this, 2?{request}{SHORT_ANSWER}",
    )
    textvqa = ask("textvqa", tmp_path / "textvqa")
    assert textvqa[0].prompt == f"what is written there, 0?\nReference OCR token: EXIT, 0{SHORT_ANSWER}"
    assert textvqa[42].prompt == f"what is written there, 0?{SHORT_ANSWER}"
    assert textvqa[0].official_id == textvqa[4].official_id == textvqa[42].official_id
    assert textvqa[41].question_id == f"{textvqa[40].question_id} #2"
    seedbench = ask("seedbench", tmp_path / "seedbench")[0]
    assert seedbench.prompt == f"Which colour, 0?\nA. red\nB. blue\nC. green\nD. black{LETTER_ANSWER}"
    assert seedbench.official_id == 101669


def test_mmbench_asks_every_rotation_of_the_options(tmp_path):
    questions = {question.official_id: question for question in ask("mmbench", tmp_path / "mmbench")}
    assert questions[0].prompt == f"Which colour, 0?\nA. red\nB. blue\nC. green\nD. black{LETTER_ANSWER}"
    hinted = '"A" hint\nof two lines\nWhich colour, 17?'
    assert questions[17].prompt == f"{hinted}\nA. red\nB. blue{LETTER_ANSWER}"
    assert questions[1_000_017].prompt == f"{hinted}\nA. blue\nB. red{LETTER_ANSWER}"
    assert questions[17].image == questions[1_000_017].image != questions[18].image
    assert questions[0].image == questions[1_000_000].image  # which only refers to it
    chinese = ask("mmbench_cn", tmp_path / "cn")[0]
    assert chinese.prompt == "Which colour, 0?\nA. 红色\nB. 蓝色\nC. 绿色\nD. 黑色\n请直接回答选项字母。"


def test_without_ocr_tokens_in_any_prompt_those_answers_are_the_score(tmp_path):
    folder = official.write_benchmark("textvqa", tmp_path / "textvqa")
    lines = [json.loads(line) for line in (folder / ANSWERS).read_text().splitlines()]
    write_lines(folder / ANSWERS, [line for line in lines if "Reference OCR" not in line["prompt"]])
    result = score("textvqa", folder, folder / ANSWERS, tmp_path / "out.json")
    assert result["score"] == result["metrics"]["accuracy_without_ocr"]
    assert result["score"] == pytest.approx(official.METRICS["textvqa"]["accuracy_without_ocr"])
    assert "accuracy_with_ocr" not in result["metrics"]


def test_vizwiz_ids_may_lack_their_ending_or_be_those_of_a_converted_file(tmp_path):
    folder = official.write_benchmark("vizwiz", tmp_path / "vizwiz")
    expected = score("vizwiz", folder, folder / ANSWERS, tmp_path / "out.json")
    lines = [json.loads(line) for line in (folder / ANSWERS).read_text().splitlines()]
    write_lines(folder / "stems.jsonl", [line | {"question_id": line["question_id"][:-4]} for line in lines])
    assert score("vizwiz", folder, folder / "stems.jsonl", tmp_path / "out.json") == expected
    images = [question.image.name for question in BENCHMARKS["vizwiz"].load_questions(folder)]
    numbers = [line | {"question_id": int(line["question_id"][11:-4])} for line in lines]
    write_lines(folder / "numbers.jsonl", numbers)
    assert score("vizwiz", folder, folder / "numbers.jsonl", tmp_path / "out.json") == expected
    write_lines(
        folder / "llava_val.jsonl", [{"question_id": 7 * row, "image": image} for row, image in enumerate(images)]
    )
    numbered = [line | {"question_id": 7 * images.index(line["question_id"])} for line in lines]
    write_lines(folder / "numbered.jsonl", numbered)
    assert score("vizwiz", folder, folder / "numbered.jsonl", tmp_path / "out.json") == expected


def drop_last_line(text):
    return "\n".join(text.splitlines()[:-1]) + "\n"


@pytest.mark.parametrize(
    "name, file, edit, message",
    [
        ("vqav2", VQA_ANSWERS, cut, r"annotations\.json, line 1: not valid JSON .*truncated"),
        ("vqav2", VQA_ANSWERS, edit_value("annotations", 3, "answers", value=[]), r"entry 3: field 'answers' is empty"),
        ("vqav2", VQA_ANSWERS, edit_value("annotations", 3, "answers", 2, "answer", value=7), r"answers\[2\]: .* is 7"),
        ("vqav2", VQA_ANSWERS, edit_value("annotations", 3, "question_id", value=5), r"entry 3: .* 5 is not in"),
        ("vqav2", VQA_ANSWERS, edit_value("annotations", 3, value=None), r"lacks question 262148003"),
        ("vqav2", VQA_ANSWERS, edit_value("annotations", value=None), r"field 'annotations' is missing"),
        ("vqav2", VQA_QUESTIONS, cut, r"questions\.json, line 1: not valid JSON"),
        ("vqav2", ANSWERS, edit_line(3, question_id=5), r"answers\.jsonl, line 3: field 'question_id': '5' is not in"),
        ("vizwiz", "val.json", edit_value(2, "image", value=None), r"val\.json, entry 2: field 'image' is missing"),
        ("vizwiz", "val.json", edit_value(2, "answers", value=None), r"entry 2: field 'answers' is missing"),
        ("vizwiz", ANSWERS, edit_line(3, question_id="x.jpg"), r"line 3: field 'question_id': 'x' is not in"),
        ("textvqa", TEXT_FILE, cut, r"line 1: not valid JSON"),
        ("textvqa", TEXT_FILE, edit_value("data", 1, "answers", value=["a"]), r"entry 1: field 'answers' .*10 strings"),
        ("textvqa", ANSWERS, edit_line(3, prompt="What?"), r"line 3: field 'prompt' is 'What\?'; expected question"),
        ("textvqa", ANSWERS, edit_line(3, prompt=None), r"line 3: field 'prompt' is missing"),
        ("textvqa", ANSWERS, edit_line(3, question_id="x"), r"line 3: field 'question_id': 'x: what is"),
        ("mmbench", MMB_FILE, cut, r"mmbench_dev_20230712\.tsv, line \d+: \d+ fields, expected 14; .*truncated"),
        ("mmbench", MMB_FILE, lambda text: text.replace("answer", "reply"), r"line 1: there is no column 'answer'"),
        ("mmbench", MMB_FILE, lambda text: text.replace("\n2\t", "\ntwo\t"), r"field 'index' is 'two', expected a num"),
        ("mmbench", MMB_FILE, lambda text: text.replace("\tC\tcolours", "\tF\tcolours"), r"field 'answer' is 'F'; val"),
        ("mmbench", ANSWERS, edit_line(3, question_id=77), r"line 3: field 'question_id': '77' is not in"),
        ("seedbench", "SEED-Bench.json", cut, r"SEED-Bench\.json, line 1: not valid JSON"),
        (
            "seedbench",
            "SEED-Bench.json",
            edit_value("questions", 1, "answer", value="E"),
            r"entry 1: .*'answer' is 'E'",
        ),
        ("seedbench", "SEED-Bench.json", edit_value("question_type", value=None), r"'question_type' is missing"),
        ("seedbench", ANSWERS, edit_line(3, question_id=1), r"line 3: field 'question_id': '1' is not in"),
    ],
)
def test_a_wrong_file_is_one_error_that_names_file_line_and_field(name, file, edit, message, tmp_path):
    folder = official.write_benchmark(name, tmp_path / name)
    (folder / file).write_text(edit((folder / file).read_text()))
    with pytest.raises(BenchmarkError, match=message):
        score(name, folder, folder / ANSWERS, folder / "metrics.json")
    assert not (folder / "metrics.json").exists()


def test_a_truncated_picture_in_a_table_is_found_when_questions_are_loaded(tmp_path):
    folder = official.write_benchmark("mmbench", tmp_path / "mmbench")
    text = (folder / MMB_FILE).read_text()
    (folder / MMB_FILE).write_text(text.replace("/9j/4", "/9j/*", 1))
    with pytest.raises(BenchmarkError, match=r"line 2: field 'image' is not base64"):
        BENCHMARKS["mmbench"].load_questions(folder)


def test_the_command_scores_and_says_in_one_line_what_is_wrong(tmp_path):
    folder = official.write_benchmark("vqav2", tmp_path / "vqav2")
    command = [sys.executable, "-m", "dualspeed.cli", "score", "vqav2", "--data", folder]
    command += ["--out", tmp_path / "out.json", "--answers"]
    assert subprocess.run([*command, folder / ANSWERS], check=False).returncode == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert {"benchmark", "metric", "score", "num_questions", "metrics", "per_question", "checksum"} <= result.keys()
    assert (result["benchmark"], result["metric"], result["prompt_version"]) == ("vqav2", "accuracy", "llava-1.5")
    (folder / ANSWERS).write_text(cut((folder / ANSWERS).read_text()))
    failed = subprocess.run([*command, folder / ANSWERS], check=False, capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr.startswith("dualspeed score: ") and failed.stderr.count("\n") == 1
