"""Figure of kept tokens: it shows the tokens that fast mode keeps, at their place in the picture."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dualspeed.benchmarks import get_benchmark
from dualspeed.cli import main
from dualspeed.data.collator import generation_inputs
from dualspeed.method.fast_mode import encode_batch
from dualspeed.pruners import num_tokens_to_keep
from dualspeed.reporting.figures.kept_tokens import (
    fade,
    kept_positions,
    models_by_pruner,
    pick_questions,
    tower_view,
)
from dualspeed.settings.jobs import KeptTokensSettings, write_settings
from dualspeed.settings.names import PRUNER_LABELS
from tests.support import official, tiny
from tests.support.stand_in import host_syncs

RATIO = 0.7


@pytest.fixture(scope="module")
def gqa(tmp_path_factory) -> Path:
    return official.write_benchmark("gqa", tmp_path_factory.mktemp("official") / "gqa")


def inputs_of(processor, gqa: Path, number: int = 0):
    question = get_benchmark("gqa").load_questions(gqa)[number]
    return generation_inputs(processor, [{"image": question.image, "prompt": "is there a digit ?"}])


def test_every_method_keeps_its_share_of_the_same_grid(gqa):
    inputs = inputs_of(tiny.llava_processor(), gqa)
    models = models_by_pruner(tiny.llava().eval(), RATIO)
    assert list(models) == list(PRUNER_LABELS)
    for model in models.values():
        kept, side = kept_positions(model, inputs)
        assert side * side == tiny.NUM_IMAGE_TOKENS
        assert len(set(kept)) == len(kept) == num_tokens_to_keep(tiny.NUM_IMAGE_TOKENS, RATIO)


def test_attention_pruner_keeps_the_tokens_with_most_attention(gqa):
    model = models_by_pruner(tiny.llava().eval(), RATIO)["fastervlm"]
    inputs = inputs_of(tiny.llava_processor(), gqa)
    kept, _ = kept_positions(model, inputs)
    with torch.no_grad():
        attention = encode_batch(model, {"pixel_values": inputs["pixel_values"]}).described["cls_attention"]
    assert set(kept) == set(attention.topk(len(kept)).indices.tolist())


def test_of_tiles_the_overview_is_drawn(gqa):
    processor = tiny.llava_next_processor()
    inputs = inputs_of(processor, gqa)
    kept, side = kept_positions(models_by_pruner(tiny.llava_next().eval(), RATIO)["uniform"], inputs)
    assert side * side == tiny.NUM_IMAGE_TOKENS and len(kept) > 0 and max(kept) < side * side
    assert tower_view(inputs["pixel_values"], processor).shape == (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, 3)


def test_the_picture_is_what_the_tower_sees(gqa):
    processor = tiny.llava_processor()
    inputs = inputs_of(processor, gqa)
    picture = tower_view(inputs["pixel_values"], processor)
    with Image.open(get_benchmark("gqa").load_questions(gqa)[0].image) as image:
        original = np.asarray(image.convert("RGB")) / 255
    assert picture.shape == original.shape
    np.testing.assert_allclose(picture, original, atol=1e-5)


def test_only_what_is_kept_stays_as_it_is():
    picture = np.random.default_rng(0).random((8, 8, 3)) * 0.5
    faded = fade(picture, np.array([1, 14]), side=4)
    kept = np.zeros((8, 8), dtype=bool)
    kept[0:2, 2:4] = kept[6:8, 4:6] = True
    assert (faded[kept] == picture[kept]).all()
    assert (faded[~kept] > 0.8).all()


def test_each_picture_is_shown_once(gqa):
    questions = get_benchmark("gqa").load_questions(gqa)
    picked = pick_questions(questions, 2)
    assert len(picked) == len({question.image for question in picked}) == 2
    assert len(pick_questions(questions, 100)) == 4


def test_the_command_writes_the_same_figure_again_and_on_an_accelerator(gqa, tmp_path):
    tiny.make_llava(tmp_path / "model")
    settings = KeptTokensSettings(benchmark="gqa", folder=str(gqa), pruning_ratio=RATIO)
    file = str(write_settings(settings, tmp_path / "settings"))
    arguments = ["--settings", file, "--model", str(tmp_path / "model")]
    for name in ("one", "two"):
        assert main(["kept-tokens", *arguments, "--out", str(tmp_path / name)]) == 0
    with host_syncs() as syncs:  # an accelerator is used, and keeps the CPU's tokens
        assert main(["kept-tokens", *arguments, "--out", str(tmp_path / "accelerator")]) == 0
    assert any("kept_tokens.py" in sync for sync in syncs.ours())
    for kind in ("png", "svg"):
        for other in ("two", "accelerator"):
            assert (tmp_path / f"one.{kind}").read_bytes() == (tmp_path / f"{other}.{kind}").read_bytes()
    with Image.open(tmp_path / "one.png") as image:
        assert image.width > 1500
