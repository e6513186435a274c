"""Answers of a tiny random model: equal in any batch, after any kill, and to those of the stock model."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from dualspeed.benchmarks import BENCHMARKS
from dualspeed.data.images import open_image
from dualspeed.errors import BenchmarkError, ConfigError
from dualspeed.evaluation import answering
from dualspeed.evaluation.answering import generate_answers
from dualspeed.evaluation.generator import AnswerGenerator, pruned_config
from dualspeed.evaluation.scoring import score
from dualspeed.files import write_json
from dualspeed.settings.jobs import AnswerSettings, write_settings
from dualspeed.settings.method import DualSpeedConfig
from dualspeed.settings.reading import read_dataclass
from dualspeed.tracking.delivery import ParentRun
from dualspeed.tracking.store import Store
from tests.support import official, tiny
from tests.support.stand_in import NAME, host_syncs

NAMES = ("gqa", "mme", "pope", "scienceqa")
LIMITS = {"gqa": 10, "mme": 1, "pope": 4, "scienceqa": 10}
NUM_QUESTIONS = {"gqa": 10, "mme": 16, "pope": 12, "scienceqa": 10}
# More (KILLS=20 pytest ...) have the same result and take longer.
KILLS = int(os.environ.get("KILLS", "5"))
PRUNED = {"inference": "pruned", "pruner": "divprune", "pruning_ratio": 0.5}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_talkative(tiny.make_llava(tmp_path_factory.mktemp("models") / "tiny"))


def make_talkative(folder):
    """Enlarge weights, so that answers to similar questions differ: equal answers could hide a mistake."""
    weights = load_file(folder / "model.safetensors")
    for name, value in weights.items():
        if value.dim() > 1 and "vision_tower" not in name:
            weights[name] = 8 * value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("benchmarks")
    return {name: str(official.write_benchmark(name, root / name, limit=LIMITS[name])) for name in NAMES}


def settings(folders, **changes):
    values = {
        "experiment": "tiny",
        "inference": "full",
        "benchmarks": {name: {"folder": folder} for name, folder in folders.items()},
        "batch_size": 8,
        "max_new_tokens": 6,
    }
    return read_dataclass(AnswerSettings, values | changes, "settings")


def read(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def texts(folder):
    return {name: [line["text"] for line in read(folder, name)] for name in NAMES}


@pytest.mark.parametrize("inference", [{}, PRUNED], ids=["full", "pruned"])
def test_batches_of_eight_answer_as_each_question_alone(inference, model, folders, tmp_path):
    for batch_size in (1, 8):
        chosen = settings(folders, batch_size=batch_size, **inference)
        generate_answers(chosen, model, tmp_path / "state", tmp_path / str(batch_size))
    alone, batched = texts(tmp_path / "1"), texts(tmp_path / "8")
    assert alone == batched
    assert (
        len({text for answers in alone.values() for text in answers}) > 15
    )  # equal answers to all would hide a mistake


@pytest.mark.parametrize("inference", [{}, PRUNED], ids=["full", "pruned"])
def test_an_accelerator_is_used_and_gives_the_cpus_answers(inference, model, folders, tmp_path):
    chosen = settings(folders, **inference)
    generate_answers(chosen, model, tmp_path / "state", tmp_path / "cpu")
    with host_syncs() as syncs:
        generate_answers(chosen, model, tmp_path / "other_state", tmp_path / "accelerator")
        assert AnswerGenerator(model, 6).device.type == NAME
    assert len(syncs) > 0 and AnswerGenerator(model, 6).device.type == "cpu"
    assert texts(tmp_path / "accelerator") == texts(tmp_path / "cpu")


def test_answers_are_those_of_the_stock_model(model, folders, tmp_path):
    generate_answers(settings(folders), model, tmp_path / "state", tmp_path / "out")
    stock, processor = AutoModelForImageTextToText.from_pretrained(model), AutoProcessor.from_pretrained(model)
    for name, folder in folders.items():
        questions = BENCHMARKS[name].load_questions(Path(folder))
        for question, line in zip(questions, read(tmp_path / "out", name), strict=True):
            content = [
                {"type": "image", "image": open_image(question.image)},
                {"type": "text", "text": question.prompt},
            ]
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            output = stock.generate(**inputs, do_sample=False, max_new_tokens=6)
            new_tokens = output[0, inputs["input_ids"].shape[1] :]
            assert line["text"] == processor.decode(new_tokens, skip_special_tokens=True).strip()
            assert line["prompt"].removeprefix("<image>\n") == question.prompt
            assert line["question_id"] == question.official_id
            assert set(line) == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    assert all(line["prompt"].startswith("<image>\n") for line in read(tmp_path / "out", "scienceqa"))


def test_answers_can_be_scored(model, folders, tmp_path):
    generate_answers(settings(folders), model, tmp_path / "state", tmp_path / "out")
    for name, folder in folders.items():
        result = score(name, folder, tmp_path / "out" / f"{name}.jsonl", tmp_path / f"{name}.json")
        assert (result["num_questions"], result["num_missing"]) == (NUM_QUESTIONS[name], 0)
        throughput = json.loads((tmp_path / "out" / f"{name}.throughput.json").read_text())
        assert throughput["num_questions"] == NUM_QUESTIONS[name]
        assert throughput["questions_per_second"] > 0


def test_llava_next_answers_images_of_different_shapes_as_each_alone(tmp_path):
    folder = official.write_benchmark("pope", tmp_path / "pope", limit=6)
    for number, path in enumerate(sorted((folder / "images").iterdir())):
        Image.open(path).resize((28 + 14 * number, 60 - 8 * number)).save(path)
    model = make_talkative(tiny.make_llava_next(tmp_path / "model"))
    for inference, changes in {"full": {}, "pruned": PRUNED}.items():
        answers = []
        for batch_size in (1, 8):
            out = tmp_path / inference / str(batch_size)
            chosen = settings({"pope": str(folder)}, batch_size=batch_size, **changes)
            generate_answers(chosen, model, tmp_path / "state", out)
            answers.append([line["text"] for line in read(out, "pope")])
        assert answers[0] == answers[1]
        assert len(set(answers[0])) > 3


def test_generation_cut_at_any_byte_goes_on_where_it_was(model, folders, tmp_path, monkeypatch):
    chosen = settings({"mme": folders["mme"]}, batch_size=2)
    generate_answers(chosen, model, tmp_path / "state", tmp_path / "whole")
    expected = (tmp_path / "whole" / "mme.jsonl").read_bytes()
    (state,) = (tmp_path / "state").glob("*/answers.jsonl")
    whole = state.read_bytes()
    generator = AnswerGenerator(model, max_new_tokens=6)
    asked = []
    monkeypatch.setattr(answering, "load_generator", lambda *_: generator)
    monkeypatch.setattr(
        generator, "answer", lambda batch: asked.extend(batch) or AnswerGenerator.answer(generator, batch)
    )
    cuts = [0, 1, len(whole) - 1, *random.Random(0).sample(range(len(whole)), 8)]
    for number, size in enumerate(cuts):
        state.write_bytes(whole[:size])
        kept = sum(len(json.loads(line)["texts"]) for line in whole[:size].split(b"\n")[:-1])
        asked.clear()
        generate_answers(chosen, model, tmp_path / "state", tmp_path / str(number))
        assert (tmp_path / str(number) / "mme.jsonl").read_bytes() == expected
        assert len(asked) == NUM_QUESTIONS["mme"] - kept
        ids = [key for line in state.read_text().splitlines() for key in json.loads(line)["texts"]]
        assert len(ids) == len(set(ids)) == NUM_QUESTIONS["mme"]


def test_shards_leave_their_answers_and_the_run_after_them_merges_all_in_order(model, folders, tmp_path, monkeypatch):
    textvqa = official.write_benchmark("textvqa", tmp_path / "textvqa")
    chosen = settings({"mme": folders["mme"], "textvqa": str(textvqa)})
    generate_answers(chosen, model, tmp_path / "state", tmp_path / "whole")
    generator, asked = AnswerGenerator(model, max_new_tokens=6), []
    monkeypatch.setattr(answering, "load_generator", lambda *_: generator)
    monkeypatch.setattr(
        generator, "answer", lambda batch: asked.extend(batch) or AnswerGenerator.answer(generator, batch)
    )
    for shard in ((2, 2), (1, 2)):
        generate_answers(chosen, model, tmp_path / "shards", tmp_path / "merged", shard=shard)
        assert not (tmp_path / "merged").exists()
    assert len(asked) == len({question.question_id for question in asked}) == 16 + 2 * 42
    for torn in sorted((tmp_path / "shards").glob("*/answers-1of2.jsonl")):
        torn.write_bytes(torn.read_bytes()[:-9])  # as a kill leaves it
    asked.clear()
    generate_answers(chosen, model, tmp_path / "shards", tmp_path / "merged")
    assert 0 < len(asked) <= 16
    for name in ("mme", "textvqa"):
        assert (tmp_path / "merged" / f"{name}.jsonl").read_bytes() == (tmp_path / f"whole/{name}.jsonl").read_bytes()


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_answers_do_not_depend_on_the_side_that_the_processor_pads(padding_side, model, folders, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    saved = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps(saved | {"padding_side": padding_side}))
    assert AutoProcessor.from_pretrained(copy).tokenizer.padding_side == padding_side
    answers = []
    for batch_size in (1, 8):
        chosen = settings({"gqa": folders["gqa"]}, batch_size=batch_size)
        generate_answers(chosen, copy, tmp_path / "state", tmp_path / str(batch_size))
        answers.append([line["text"] for line in read(tmp_path / str(batch_size), "gqa")])
    generate_answers(settings({"gqa": folders["gqa"]}), model, tmp_path / "state", tmp_path / "stock")
    assert answers[0] == answers[1] == [line["text"] for line in read(tmp_path / "stock", "gqa")]


@pytest.mark.slow
def test_killed_generations_end_with_the_answers_of_an_undisturbed_one(model, folders, tmp_path):
    chosen = settings(folders, batch_size=1)
    generate_answers(chosen, model, tmp_path / "state", tmp_path / "whole")
    file = write_settings(chosen, tmp_path / "settings")
    imports = "import sys, dualspeed.evaluation.answering as a, dualspeed.settings.jobs as j"
    code = f"{imports}; a.generate_answers(j.read_settings(j.AnswerSettings, sys.argv[1]), *sys.argv[2:])"
    size = sum(path.stat().st_size for path in (tmp_path / "state").glob("*/answers.jsonl"))
    rng = random.Random(0)
    for number in range(KILLS):
        state, out = tmp_path / f"state{number}", tmp_path / f"out{number}"
        job = subprocess.Popen([sys.executable, "-c", code, file, model, state, out])
        wanted = rng.randrange(1, size * 3 // 4)
        while job.poll() is None and sum(path.stat().st_size for path in state.glob("*/answers.jsonl")) < wanted:
            time.sleep(0.002)
        os.kill(job.pid, signal.SIGKILL)
        assert job.wait() == -signal.SIGKILL  # it was still at work
        assert not all((out / f"{name}.jsonl").exists() for name in NAMES)
        generate_answers(chosen, model, state, out)
        for name in NAMES:
            assert (out / f"{name}.jsonl").read_bytes() == (tmp_path / "whole" / f"{name}.jsonl").read_bytes()


def test_what_is_answered_loads_no_model_and_a_new_benchmark_asks_only_its_own_questions(
    model, folders, tmp_path, monkeypatch
):
    first = {"pope": folders["pope"], "gqa": folders["gqa"]}
    generate_answers(settings(first), model, tmp_path / "state", tmp_path / "out")
    generator, asked = AnswerGenerator(model, max_new_tokens=6), []
    monkeypatch.setattr(
        generator, "answer", lambda batch: asked.extend(batch) or AnswerGenerator.answer(generator, batch)
    )
    monkeypatch.setattr(answering, "load_generator", lambda *_: generator)
    generate_answers(settings(first | {"mme": folders["mme"]}), model, tmp_path / "state", tmp_path / "more")
    mme = {question.question_id for question in BENCHMARKS["mme"].load_questions(Path(folders["mme"]))}
    assert {question.question_id for question in asked} == mme
    monkeypatch.setattr(answering, "load_generator", lambda *_: pytest.fail("a model was loaded"))
    generate_answers(settings(first), model, tmp_path / "state", tmp_path / "again")
    for name in first:
        assert (tmp_path / "again" / f"{name}.jsonl").read_bytes() == (tmp_path / "out" / f"{name}.jsonl").read_bytes()


def test_other_weights_settings_or_images_never_take_over_answers(model, tmp_path):
    folder = official.write_benchmark("gqa", tmp_path / "gqa", limit=10)
    other = tiny.make_llava(tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: -value for name, value in weights.items()}, other / "model.safetensors", {"format": "pt"})

    def states(number, used=model, **changes):
        out = tmp_path / "out" / str(number)
        generate_answers(settings({"gqa": str(folder)}, **changes), used, tmp_path / "state", out)
        return len(list((tmp_path / "state").iterdir()))

    assert states(0) == 1
    assert states(1) == 1
    assert states(2, other) == 2
    assert (tmp_path / "out/2/gqa.jsonl").read_text() != (tmp_path / "out/0/gqa.jsonl").read_text()
    assert states(3, max_new_tokens=2) == 3
    assert states(4, **PRUNED) == 4
    (other / "training.json").write_text("{}")
    assert states(5, other) == 4
    image = next((folder / "images").iterdir())
    Image.new("RGB", (28, 28)).save(image)
    assert states(6) == 5


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"inference": "fast"}, r"inference: 'fast' is unknown.*valid: full, pruned"),
        ({"benchmarks": {"popes": {"folder": "x"}}}, r"'popes' is unknown.*valid: gqa, mmbench, .*, vqav2, vqav2_test"),
        ({"benchmarks": {"pope": {"folders": "x"}}}, r"benchmarks\.pope\.folders: unknown key"),
        ({"inference": "pruned"}, r"pruned needs pruner and pruning_ratio"),
        (PRUNED | {"pruner": "divprunes"}, r"pruner: 'divprunes' is unknown"),
        (PRUNED | {"pruning_ratio": 1.0}, r"pruning_ratio: 1\.0 is out of range"),
        ({"batch_size": 0}, r"batch_size: 0 is out of range"),
        ({"max_tokens": 4}, r"max_tokens: unknown key"),
        ({"batch_size": "8"}, r"batch_size: '8'"),
    ],
)
def test_a_wrong_setting_is_an_error_before_anything_is_loaded(changes, message, model, folders, tmp_path):
    with pytest.raises(ConfigError, match=message):
        generate_answers(settings(folders, **changes), model, tmp_path / "state", tmp_path / "out")


def test_bad_images_are_an_error_before_the_model_is_loaded(model, tmp_path, monkeypatch):
    monkeypatch.setattr(answering, "load_generator", lambda *_: pytest.fail("a model was loaded"))
    folder = official.write_benchmark("gqa", tmp_path / "gqa", limit=10)
    image = folder / "images" / "n1.jpg"
    whole = image.read_bytes()
    for content, message in [(None, "1 of 4 images are missing: .*n1.jpg"), (whole[:400], r"n1\.jpg \(truncated")]:
        image.unlink()
        if content is not None:
            image.write_bytes(content)
        with pytest.raises(BenchmarkError, match=message):
            generate_answers(settings({"gqa": str(folder)}), model, tmp_path / "state", tmp_path / "out")
        image.write_bytes(whole)
    with pytest.raises(ConfigError, match=r"there is no \*\.safetensors"):
        generate_answers(settings({"gqa": str(folder)}), tmp_path, tmp_path / "state", tmp_path / "out")


def test_pruned_inference_has_an_isolator_where_one_was_trained(tmp_path):
    trained, untrained = DualSpeedConfig(num_virtual_tokens=2), DualSpeedConfig(num_virtual_tokens=2, slow_mode_ratio=1)
    for config, has_file, expected in [(trained, True, 2), (trained, False, 0), (untrained, True, 0)]:
        write_json(tmp_path / "dualspeed.json", vars(config))
        (tmp_path / "mode_isolator.safetensors").unlink(missing_ok=True)
        if has_file:
            save_file({"mode_isolator.weight": torch.zeros(2, 4)}, tmp_path / "mode_isolator.safetensors")
        chosen = pruned_config(tmp_path, "random", 0.75)
        assert (chosen.pruner, chosen.pruning_ratio, chosen.num_virtual_tokens) == ("random", 0.75, expected)


def test_throughput_is_logged_to_the_rows_run(model, folders, tmp_path):
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracking, parent = Store(uri, "test"), ParentRun("tiny", "abc")
    generate_answers(settings({"gqa": folders["gqa"]}), model, tmp_path / "state", tmp_path / "out", tracking, parent)
    client = MlflowClient(uri)
    runs = {run.info.run_name: run for run in client.search_runs([client.get_experiment_by_name("test").experiment_id])}
    run = runs["tiny/full"]
    assert run.data.metrics["gqa_questions_per_second"] > 0
    assert run.data.tags["mlflow.parentRunId"] == runs["tiny"].info.run_id
