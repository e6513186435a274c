"""Official scores of answers on which the rules differ, computed by hand (the tables in tests/support/official.py)."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from dualspeed.benchmarks import BENCHMARKS, get_benchmark, get_question_set, gqa, mme, pope, scienceqa, unit_ids
from dualspeed.errors import BenchmarkError, ConfigError
from dualspeed.evaluation.scoring import score
from dualspeed.files import sha256_of_file
from dualspeed.settings.names import BENCHMARK_NAMES, BENCHMARK_TABLE
from tests.support import official, official_choice, official_vqa
from tests.support.edits import cut, edit_line, edit_value

NAMES = sorted(official.WRITERS)


def score_folder(name, folder):
    return score(name, folder, folder / "answers.jsonl", folder / "metrics.json")


def score_records(name, folder):
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    answers = {BENCHMARKS[name].answer_key(line, ""): line["text"] for line in lines}
    return BENCHMARKS[name].score_answers(folder, answers)


@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_metrics_are_those_worked_out_by_hand_in_any_order_of_answers(name, seed, tmp_path):
    result = score_folder(name, official.write_benchmark(name, tmp_path / name, seed))
    assert {key: result["metrics"][key] for key in official.METRICS[name]} == pytest.approx(official.METRICS[name])
    assert result["num_questions"] == official.NUM_QUESTIONS[name]
    assert result["num_missing"] == official.NUM_MISSING[name]


def test_every_verdict_is_that_of_its_table(tmp_path):
    tables = {
        "gqa": [right for *_, right in official.GQA],
        "scienceqa": [right for *_, right in official.SCIENCEQA],
        "pope": [int(label == reads) for rows in official.POPE.values() for label, _, reads in rows],
        "vqav2": [score for *_, score, _ in official_vqa.VQAV2],
        "vizwiz": [score for *_, score, _ in official_vqa.VIZWIZ],
        "mmbench": [right for _, _, right, _, _ in official_choice.MMBENCH],
        "mmbench_cn": [right for _, _, right, _, _ in official_choice.MMBENCH],
        "seedbench": [right for *_, right, _ in official_choice.SEEDBENCH],
    }
    for name, verdicts in tables.items():
        result = score_folder(name, official.write_benchmark(name, tmp_path / name, seed=3))
        assert list(result["per_question"].values()) == pytest.approx(verdicts), name
    result = score_folder("mme", official.write_benchmark("mme", tmp_path / "mme", seed=3))
    for category, images in official.MME.items():
        for number, pair in enumerate(images):
            for gold, (_, right) in zip(("yes", "no"), pair, strict=True):
                key = f"{category}/{number:04d}: Is this {number} a {gold} case?"
                assert result["per_question"][key] == right, key


@pytest.mark.parametrize(
    "parse, text, reading",
    [
        (pope.parse_answer, "Not", "yes"),
        (pope.parse_answer, "not", "no"),
        (pope.parse_answer, "no, yes", "no"),
        (pope.parse_answer, "yes no", "no"),
        (pope.parse_answer, "No\nthere is none", "yes"),
        (pope.parse_answer, ".no", "yes"),
        (gqa.parse_answer, "Yes. ", "yes. "),
        (gqa.parse_answer, ".", ""),
        (scienceqa.parse_answer, "F", "FAILED"),
        (scienceqa.parse_answer, "A.\n", "FAILED"),
        (scienceqa.parse_answer, "So: The answer is B, of course", "B"),
        (scienceqa.parse_answer, "The answer is Z.", "Z"),
        (scienceqa.parse_answer, "", "FAILED"),
        (mme.parse_answer, "YES", "yes"),
        (mme.parse_answer, "no yes", "no"),
        (mme.parse_answer, "  yes", "other"),
        (mme.parse_answer, "n", "other"),
    ],
)
def test_answers_read_as_by_the_official_rule(parse, text, reading):
    assert parse(text) == reading


def test_prompts_and_images_are_those_of_llava(tmp_path):
    questions = {
        name: BENCHMARKS[name].load_questions(official.write_benchmark(name, tmp_path / name)) for name in NAMES
    }
    asked_more = {"textvqa": 2 * 42, "mmbench": 157, "mmbench_cn": 157}  # with and without OCR; rotations
    assert {name: len(asked) for name, asked in questions.items()} == official.NUM_QUESTIONS | asked_more
    assert questions["pope"][0].prompt == "Is there a snowboard in the image?" + official.SHORT_ANSWER
    assert questions["pope"][0].official_id == 1
    assert questions["scienceqa"][0].prompt == (
        "Context: N/A\nQuestion: Which one, 0?\nOptions: (A) the red one (B) the blue one (C) the green one\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert questions["mme"][0].official_id == questions["mme"][1].official_id == "artwork/0000.png"
    assert questions["mme"][0].prompt == "Is this 0 a yes case?" + official.SHORT_ANSWER
    for asked in questions.values():
        assert len({question.question_id for question in asked}) == len(asked)
        assert all(question.image.is_file() for question in asked)


@pytest.mark.parametrize("name", NAMES)
def test_percent_from_sums_is_the_metric_of_every_resample(name, tmp_path):
    benchmark = BENCHMARKS[name]
    records = score_records(name, official.write_benchmark(name, tmp_path / name))
    units, statistics = unit_ids(records), benchmark.statistics(records)
    assert len(statistics) == len(units)
    draws = np.random.default_rng(0).multinomial(len(units), np.full(len(units), 1 / len(units)), size=20)
    draws = np.vstack([np.ones_like(draws[0]), draws])
    percents = benchmark.percent_from_sums(draws @ statistics)
    assert percents.shape == (21,)
    for counts, percent in zip(draws, percents, strict=True):
        drawn = [
            replace(record, image_id=f"{record.unit} {copy}")
            for record in records
            for copy in range(counts[units.index(record.unit)])
        ]
        assert percent == pytest.approx(benchmark.metrics(drawn)[benchmark.percent])


def test_metrics_file_holds_what_tables_need(tmp_path):
    folder = official.write_benchmark("mme", tmp_path / "mme")
    result = score_folder("mme", folder)
    assert json.loads((folder / "metrics.json").read_text()) == result
    assert (result["benchmark"], result["metric"], result["percent_metric"]) == ("mme", "perception", "acc")
    assert result["score"] == pytest.approx(official.MME_METRICS["perception"])
    assert result["percent"] == pytest.approx(official.MME_METRICS["acc"])
    assert result["interval"][0] < result["score"] < result["interval"][1] < 2000
    assert result["percent_interval"][0] < result["percent"] < result["percent_interval"][1] < 100
    assert result["checksum"] == sha256_of_file(folder / "llava_mme.jsonl")
    assert result["unit_ids"][:3] == ["existence/0000", "existence/0001", "existence/0002"]
    assert result["statistics"][:3] == [[1, 2], [1, 2], [0, 2]]
    kinds = result["by_category"]
    assert sum(kind["num_questions"] for kind in kinds.values()) == result["num_questions"]
    right = sum(result["per_question"][key] for key in result["per_question"] if key.startswith("existence/"))
    assert kinds["existence"]["accuracy"] == pytest.approx(100 * right / kinds["existence"]["num_questions"])


def test_files_may_lie_as_in_llavas_evaluation_folder(tmp_path):
    moves = {
        "pope": [("images", "val2014"), *((f"coco_pope_{split}.json", "coco") for split in official.POPE)],
        "gqa": [("testdev_balanced_questions.json", "data"), ("images", "data/images")],
        "mme": [("MME_Benchmark_release_version", "MME_Benchmark_release_version/MME_Benchmark")],
    }
    for name, pairs in moves.items():
        folder = official.write_benchmark(name, tmp_path / name)
        before = score_folder(name, folder)
        for source, target in pairs:
            source, target = folder / source, folder / target
            if source.is_file():
                target.mkdir(exist_ok=True)
                source.rename(target / source.name)
            else:
                aside = source.rename(folder / "aside")
                target.parent.mkdir(exist_ok=True)
                aside.rename(target)
        assert score_folder(name, folder) == before
        assert all(question.image.is_file() for question in BENCHMARKS[name].load_questions(folder))


ANSWERS, MME_TEXT = "answers.jsonl", "MME_Benchmark_release_version/existence/0001.txt"
PROBLEMS, GQA_FILE = "problems.json", "testdev_balanced_questions.json"


@pytest.mark.parametrize(
    "name, file, edit, message",
    [
        ("pope", ANSWERS, cut, r"answers\.jsonl, line 42: not valid JSON .*truncated"),
        ("pope", ANSWERS, lambda text: "", r"answers\.jsonl: the file is empty"),
        ("pope", ANSWERS, lambda text: "7\n", r"line 1: expected a JSON object"),
        ("pope", ANSWERS, edit_line(3, text=None), r"answers\.jsonl, line 3: field 'text' is missing"),
        ("pope", ANSWERS, edit_line(3, text=5), r"line 3: field 'text' is 5, expected str"),
        ("pope", ANSWERS, edit_line(3, question_id=None), r"line 3: field 'question_id' is missing"),
        ("pope", ANSWERS, edit_line(3, question_id=99), r"answers\.jsonl, line 3: field 'question_id': '99' is not in"),
        ("pope", ANSWERS, edit_line(3, question_id="1"), r"line 3: field 'question_id': '1' is answered by an earlier"),
        ("pope", "coco_pope_popular.json", cut, r"coco_pope_popular\.json, line 12: not valid JSON"),
        ("pope", "coco_pope_random.json", edit_line(2, label="maybe"), r"line 2: field 'label' is 'maybe'; valid: yes"),
        ("pope", "coco_pope_random.json", edit_line(2, label=None), r"coco_pope_random\.json, line 2: field 'label'"),
        ("pope", "coco_pope_random.json", None, r"there is no coco_pope_random\.json"),
        ("pope", "llava_pope_test.jsonl", edit_line(1, category="odd"), r"line 1: field 'category' is 'odd'; valid"),
        ("pope", "llava_pope_test.jsonl", edit_line(2, question_id=1), r"question_id '1' occurs twice"),
        ("pope", "llava_pope_test.jsonl", edit_line(2, image="x.jpg"), r"line 2: fields 'image' and 'text' are not in"),
        ("pope", "llava_pope_test.jsonl", lambda text: text.partition("\n")[2], r"'1' is not in .*llava_pope_test"),
        ("gqa", GQA_FILE, cut, r"testdev_balanced_questions\.json, line 1: not valid JSON .*truncated"),
        ("gqa", GQA_FILE, lambda text: "[]", r"holds a JSON list, expected a dict"),
        ("gqa", GQA_FILE, edit_value("201307251", "answer", value=None), r"question 201307251: field 'answer' is miss"),
        ("gqa", GQA_FILE, edit_value("201307251", "isBalanced", value=1), r"field 'isBalanced' is 1, expected bool"),
        ("gqa", GQA_FILE, edit_value("201307251", "types", "structural", value=None), r"'types': field 'structural'"),
        ("gqa", ANSWERS, edit_line(1, question_id="5"), r"line 1: field 'question_id': '5' is not in .*testdev"),
        ("scienceqa", PROBLEMS, cut, r"problems\.json, line 1: not valid JSON"),
        (
            "scienceqa",
            PROBLEMS,
            edit_value("101", "choices", value=["one"]),
            r"101: field 'answer' is 1, but there are",
        ),
        ("scienceqa", PROBLEMS, edit_value("101", value=None), r"problems\.json: field '101' is missing"),
        ("scienceqa", PROBLEMS, edit_value("101", "image", value=None), r"problem 101: field 'image' is missing"),
        ("scienceqa", "pid_splits.json", edit_value("test", value=None), r"pid_splits\.json: field 'test' is missing"),
        ("mme", MME_TEXT, cut, r"0001\.txt, line 2: answer is '' after the tab; valid: Yes, No"),
        ("mme", MME_TEXT, lambda text: text.replace("\tYes", " Yes"), r"0001\.txt, line 1: answer is ''"),
        ("mme", MME_TEXT, lambda text: text.splitlines()[0], r"0001\.txt: has 1 questions, expected 2"),
        ("mme", ANSWERS, edit_line(2, prompt=None), r"answers\.jsonl, line 2: field 'prompt' is missing"),
        ("mme", ANSWERS, edit_line(2, prompt="Is it?"), r"line 2: field 'question_id': 'artwork/0000: Is it\?' is not"),
    ],
)
def test_a_wrong_file_is_one_error_that_names_file_line_and_field(name, file, edit, message, tmp_path):
    folder = official.write_benchmark(name, tmp_path / name)
    if edit is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(edit((folder / file).read_text()))
    with pytest.raises(BenchmarkError, match=message):
        score_folder(name, folder)
    assert not (folder / "metrics.json").exists()


@pytest.mark.parametrize(
    "name, file, edit, message",
    [
        ("pope", "llava_pope_test.jsonl", edit_line(2, text=None), r"line 2: field 'text' is missing"),
        ("gqa", "llava_gqa_testdev_balanced.jsonl", cut, r"line 42: not valid JSON"),
        ("gqa", "llava_gqa_testdev_balanced.jsonl", None, r"there is no llava_gqa_testdev_balanced\.jsonl"),
        ("scienceqa", "llava_test_CQM-A.json", edit_value(1, "conversations", value=[]), r"entry 1: .*no first turn"),
        ("scienceqa", "llava_test_CQM-A.json", edit_value(1, "id", value=None), r"entry 1: field 'id' is missing"),
        ("mme", "llava_mme.jsonl", edit_line(4, image=None), r"line 4: field 'image' is missing"),
    ],
)
def test_a_wrong_question_file_is_found_when_it_is_loaded(name, file, edit, message, tmp_path):
    folder = official.write_benchmark(name, tmp_path / name)
    if edit is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(edit((folder / file).read_text()))
    with pytest.raises(BenchmarkError, match=message):
        BENCHMARKS[name].load_questions(folder)


def test_an_unknown_benchmark_lists_the_valid_ones():
    with pytest.raises(ConfigError, match=r"'popes' is unknown.*valid: gqa, mmbench, .*, vqav2"):
        get_benchmark("popes")
    assert tuple(sorted(BENCHMARKS)) == BENCHMARK_NAMES


def test_every_record_has_the_name_of_its_line_and_a_label_if_it_is_scored_here():
    for name, entry in BENCHMARK_TABLE.items():
        assert get_question_set(name).name == name
        assert bool(entry.label) != bool(entry.server_file), name


def test_scoring_loads_no_torch():
    code = "import sys, dualspeed.benchmarks, dualspeed.evaluation.scoring; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
