"""Demo data and base model: true answers, official file formats, a stock checkpoint."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

from dualspeed.benchmarks import get_benchmark
from dualspeed.demo.base_model import make_base_model
from dualspeed.demo.base_training import caption_texts, conversation_texts, optimise
from dualspeed.demo.benchmark_files import WRITERS
from dualspeed.demo.drawing import CELL, COLOURS, GRID, draw_scene, load_handwriting, sample_scene, samples_of_digit
from dualspeed.demo.questions import (
    NEGATIVES,
    SHORT_ANSWER,
    ask_choice,
    ask_colour,
    ask_count,
    ask_existence,
    ask_statement,
    sample_negative,
)
from dualspeed.demo.scenes import write_demo_data
from dualspeed.errors import ConfigError, DivergenceError
from dualspeed.settings.demo import BaseModelSettings, SceneSettings
from dualspeed.settings.reading import read_dataclass

DATA = SceneSettings(num_train_scenes=40, num_eval_scenes=30, questions_per_benchmark=60)
BASE = BaseModelSettings(num_scenes=40, vision_steps=2, caption_steps=2, question_steps=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "data"
    write_demo_data(DATA, folder)
    return folder


@pytest.fixture(scope="module")
def base(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "base"
    make_base_model(BASE, data, folder)
    return folder


def scenes(number, split="train"):
    rng = np.random.default_rng(1)
    return rng, [sample_scene(rng, split) for _ in range(number)]


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_same_settings_give_the_same_bytes(data, tmp_path):
    write_demo_data(DATA, tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(data)


def test_a_scene_has_three_to_five_different_digits_in_different_cells():
    _, drawn = scenes(200)
    assert {len(scene.items) for scene in drawn} == {3, 4, 5}
    for scene in drawn:
        assert len({item.digit for item in scene.items}) == len(scene.items)
        assert sorted({item.cell for item in scene.items}) == [item.cell for item in scene.items]


def test_a_digit_fills_exactly_its_patch_in_its_colour():
    _, (scene,) = scenes(1)
    pixels = np.asarray(draw_scene(scene)).astype(int)
    handwriting, values = load_handwriting()
    for item in scene.items:
        row, column = CELL * (item.cell // GRID), CELL * (item.cell % GRID)
        ink = handwriting[item.sample] == 1
        assert values[item.sample] == item.digit
        assert (pixels[row : row + CELL, column : column + CELL][ink] == COLOURS[item.colour]).all()
    empty = sorted(set(range(GRID * GRID)) - {item.cell for item in scene.items})
    patches = pixels.reshape(GRID, CELL, GRID, CELL, 3).swapaxes(1, 2).reshape(GRID * GRID, CELL, CELL, 3)
    assert patches[empty].min() > 220


def test_test_digits_are_in_no_training_scene():
    train, test = ({sample for samples in samples_of_digit(split) for sample in samples} for split in ("train", "test"))
    assert (len(train), len(test), len(train & test)) == (1400, 397, 0)
    assert {item.sample for scene in scenes(100, "test")[1] for item in scene.items} <= test


@pytest.mark.parametrize("negative", NEGATIVES)
def test_existence_answers_are_true_and_negatives_of_their_kind(negative):
    rng, drawn = scenes(200)
    for scene in drawn:
        colour, digit = ask_existence(scene, rng, True).text.rstrip("?").split()[-2:]
        assert scene.colour_of(int(digit)) == colour
        colour, digit = ask_existence(scene, rng, False, negative).text.rstrip("?").split()[-2:]
        assert scene.colour_of(int(digit)) != colour
        num_right = (scene.count(colour) > 0) + (scene.colour_of(int(digit)) is not None)
        if len({item.colour for item in scene.items}) > 1:
            assert num_right == NEGATIVES.index(negative)


def test_half_of_the_negatives_are_adversarial():
    rng = np.random.default_rng(0)
    counts = Counter(sample_negative(rng) for _ in range(4000))
    assert {name: round(count / 4000, 1) for name, count in counts.items()} == pytest.approx(
        {"random": 0.25, "popular": 0.25, "adversarial": 0.5}, abs=0.06
    )


def test_answers_follow_from_the_scene():
    rng, drawn = scenes(300)
    for scene in drawn:
        colours = {item.digit: item.colour for item in scene.items}
        question = ask_colour(scene, rng)
        assert colours[int(question.text.rstrip("?").split()[-1])] == question.answer
        count = ask_count(scene, rng)
        assert list(colours.values()).count(count.text.rstrip("?").split()[-1]) == int(count.answer)
        choice = ask_choice(scene, rng)
        assert choice.choices["ABCD".index(choice.reply)] == choice.answer
        assert len(set(choice.choices)) == len(choice.choices)
        subject = choice.text.rstrip("?").split()[-1]
        assert (colours[int(subject)] if subject.isdigit() else subject) in (choice.answer, colours.get(_int(choice)))


def _int(question):
    return int(question.answer) if question.answer.isdigit() else None


@pytest.mark.parametrize("answer", [True, False])
def test_statements_hold_or_not_as_asked(answer):
    rng, drawn = scenes(200)
    for scene in drawn:
        words = ask_statement(scene, rng, "color", answer).text.rstrip("?").split()
        assert (scene.colour_of(int(words[-1])) == words[1]) is answer
        words = ask_statement(scene, rng, "count", answer).text.rstrip("?").split()
        assert (scene.count(words[3]) == int(words[2])) is answer


def test_conversations_have_one_image_mark_and_llavas_suffix(data):
    records = json.loads((data / "finetune.json").read_text())
    assert len(records) == DATA.num_train_scenes
    for record in records:
        human = [turn["value"] for turn in record["conversations"] if turn["from"] == "human"]
        assert [text.count("<image>") for text in human] == [1] + [0] * (len(human) - 1)
        assert human[0].startswith("<image>\n")
        assert all(text.endswith((SHORT_ANSWER, "given choices directly.")) for text in human)
        with Image.open(data / "images" / "train" / record["image"]) as image:
            assert (image.size, image.mode) == ((GRID * CELL, GRID * CELL), "RGB")


def test_validation_is_about_scenes_that_are_not_trained_on(data):
    records = {name: json.loads((data / f"{name}.json").read_text()) for name in ("finetune", "validation")}
    assert len(records["validation"]) == DATA.num_eval_scenes  # there are no more
    pictures = {
        name: {(data / "images" / "train" / record["image"]).read_bytes() for record in records[name]}
        for name in records
    }
    assert len(pictures["validation"]) == DATA.num_eval_scenes
    assert not pictures["validation"] & pictures["finetune"]


@pytest.mark.parametrize("split", ["test", "heldout"])
@pytest.mark.parametrize("name", sorted(WRITERS))
def test_benchmark_files_load_and_true_answers_score_full_marks(data, split, name):
    benchmark = get_benchmark(name)
    folder = data / split / name
    questions = benchmark.load_questions(folder)
    assert len(questions) == DATA.questions_per_benchmark
    assert all(question.image.is_file() for question in questions)
    gold = {record.question_id: record.gold for record in benchmark.score_answers(folder, {})}
    assert len(gold) == len(questions)
    assert benchmark.metrics(benchmark.score_answers(folder, gold))[benchmark.percent] == 100


def test_yes_and_no_are_balanced_in_pope(data):
    for negative in NEGATIVES:
        lines = (data / "test" / "pope" / f"coco_pope_{negative}.json").read_text().splitlines()
        assert Counter(json.loads(line)["label"] for line in lines) == {"yes": 10, "no": 10}


def test_unknown_setting_is_named():
    with pytest.raises(ConfigError, match=r"num_scene.*num_train_scenes"):
        read_dataclass(SceneSettings, {"num_scene": 3}, "data.json")


@pytest.mark.parametrize(
    ("cls", "name", "value", "message"),
    [
        (SceneSettings, "seed", -1, r"seed: -1 is out of range; valid: 0 or more"),
        (SceneSettings, "num_train_scenes", 0, r"num_train_scenes: 0 is out of range; valid: 1 or more"),
        (BaseModelSettings, "seed", -1, r"seed: -1 is out of range; valid: 0 or more"),
        (BaseModelSettings, "text_layers", 0, r"text_layers: 0 is out of range; valid: 1 or more"),
        (BaseModelSettings, "vision_learning_rate", 0.0, r"vision_learning_rate: 0\.0 is out of range; valid: above 0"),
    ],
)
def test_setting_out_of_range_is_named(cls, name, value, message):
    with pytest.raises(ConfigError, match=rf"data\.json: {message}"):
        read_dataclass(cls, {name: value}, "data.json")


def test_diverged_training_is_one_error():
    weight = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(DivergenceError, match=r"tower: the loss is nan at step 50; try another learning rate or seed"):
        optimise("tower", [weight], lambda number: weight.sum() * float("nan"), 50, 0.1)


def test_base_model_is_stock_and_has_the_hubs_names(base):
    with safe_open(base / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {name.split(".")[0] for name in names} == {"language_model", "multi_modal_projector", "vision_tower"}
    assert {
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
        "multi_modal_projector.linear_1.weight",
        "vision_tower.vision_model.embeddings.class_embedding",
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
    } <= names
    _, report = AutoModelForImageTextToText.from_pretrained(base, output_loading_info=True)
    assert not any(report.values())


def test_base_model_learns_answers_and_captions_and_nothing_else(base, data):
    processor = AutoProcessor.from_pretrained(base)
    records = {name: json.loads((data / f"{name}.json").read_text())[:5] for name in ("pretrain", "finetune")}
    texts = caption_texts(processor.tokenizer, records["pretrain"]), conversation_texts(processor, records["finetune"])
    for name, end, encoded in zip(records, ("", "</s>"), texts, strict=True):
        for record, (ids, labels) in zip(records[name], encoded, strict=True):
            answers = "".join(turn["value"] + end for turn in record["conversations"] if turn["from"] == "gpt")
            assert processor.decode(labels[labels != -100]).replace(" ", "") == answers.replace(" ", "")
            assert (ids == processor.image_token_id).sum() == 1
            assert (ids == labels)[labels != -100].all()


def test_base_model_takes_pictures_and_its_tokenizer_knows_every_word(base, data):
    processor = AutoProcessor.from_pretrained(base)
    model = AutoModelForImageTextToText.from_pretrained(base)
    image = Image.open(data / "images" / "train" / "000000.png")
    inputs = processor(images=image, text="USER: <image>\nis there a red 7? ASSISTANT:", return_tensors="pt")
    assert (inputs.input_ids == model.config.image_token_id).sum() == GRID * GRID
    with torch.no_grad():
        assert model(**inputs).logits.shape[:2] == inputs.input_ids.shape
    for record in json.loads((data / "finetune.json").read_text()):
        for turn in record["conversations"]:
            assert processor.tokenizer.unk_token_id not in processor.tokenizer(turn["value"]).input_ids


@pytest.mark.parametrize("word", ["yes", "no", "red", "7", "B"])
def test_answers_decode_to_themselves(base, word):
    tokenizer = AutoProcessor.from_pretrained(base).tokenizer
    ids = tokenizer(f"{word}</s>", add_special_tokens=False).input_ids
    assert len(ids) == 2
    assert tokenizer.decode(ids, skip_special_tokens=True) == word
