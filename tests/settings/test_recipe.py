"""Effects of a recipe's keys on a training: precision, the vision tower, and image_aspect_ratio."""

import dataclasses
import json

import pytest
import torch
from datasets import Dataset, load_from_disk
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, AutoProcessor

from dualspeed import DualSpeedConfig, DualSpeedModel, Mode
from dualspeed.data.processing import load_processor
from dualspeed.errors import ConfigError
from dualspeed.settings.training_arguments import check_training_arguments
from dualspeed.training import stage as training
from dualspeed.training.grouping import group_lengths
from dualspeed.training.stage import load_model, train
from dualspeed.training.trainable import hold_trained_weights_in_float32, parts_of, set_trainable
from tests.support import tiny
from tests.support.batches import collate, sample
from tests.support.stage import stage_settings, train_stage


def changed(stage="finetune", arguments=None, **recipe):
    chosen = stage_settings(stage)
    chosen.recipe.training_arguments.update(arguments or {})
    return dataclasses.replace(chosen, recipe=dataclasses.replace(chosen.recipe, **recipe))


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A checkpoint in bfloat16."""
    folder = tmp_path_factory.mktemp("half")
    tiny.make_llava(folder / "float32")
    model = AutoModelForImageTextToText.from_pretrained(folder / "float32", dtype=torch.bfloat16)
    model.save_pretrained(folder / "base")
    tiny.llava_processor().save_pretrained(folder / "base")
    return folder / "base"


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_bfloat16_checkpoint_is_trained_in_float32_and_saved_as_it_was(half, stage_inputs, tmp_path, stage):
    chosen = changed(stage, {"bf16": True, "learning_rate": 1e-5})
    model, _ = load_model(chosen, half)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    out = train_stage(stage_inputs, tmp_path, chosen, half)
    saved = load_file(out / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.bfloat16}
    assert AutoModelForImageTextToText.from_pretrained(out).dtype == torch.bfloat16
    assert saved.keys() == load_file(half / "model.safetensors").keys()


def test_a_bfloat16_checkpoint_without_mixed_precision_is_refused(half, stage_inputs, tmp_path):
    with pytest.raises(ConfigError, match=r"the weights are in bfloat16 and float32.*valid: bf16=True in the training"):
        train_stage(stage_inputs, tmp_path, changed(), half)


def test_label_smoothing_of_a_recipe_acts(stage_inputs, tmp_path):
    losses = []
    for factor in (0.0, 0.3):
        chosen = changed(arguments={"label_smoothing_factor": factor, "max_steps": 2, "save_strategy": "no"})
        out = train_stage(stage_inputs, tmp_path / str(factor), chosen)
        losses.append(json.loads((out / "training.json").read_text())["final"]["loss"])
    assert losses[1] != pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize("name", ["save_only_model", "ignore_data_skip"])
def test_what_would_end_in_other_weights_is_refused(name):
    with pytest.raises(ConfigError, match=f"training_arguments.{name}: not set here; valid: a stage resumes"):
        check_training_arguments({name: True})


def test_a_resumed_bfloat16_training_ends_where_an_uninterrupted_one_does(half, stage_inputs, tmp_path):
    chosen = changed("pretrain", {"bf16": True})
    whole = train_stage(stage_inputs, tmp_path / "whole", chosen, half)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.ResumableTrainer, "save_model", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_stage(stage_inputs, tmp_path / "cut", chosen, half)
    resumed = train_stage(stage_inputs, tmp_path / "cut", chosen, half)
    assert_close(load_file(resumed / "model.safetensors"), load_file(whole / "model.safetensors"), rtol=0, atol=0)


def raise_interrupt(self, *args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize("make", [tiny.llava, tiny.llava_next])
def test_a_trained_vision_tower_gets_a_gradient_wherever_it_runs(make):
    family = "llava" if make is tiny.llava else "llava_next"
    model = DualSpeedModel(make(), DualSpeedConfig(pruning_ratio=0.5))
    set_trainable(model, "finetune", with_vision=True)
    hold_trained_weights_in_float32(model)
    batch = collate([sample(family, 0, 1)])
    for mode in Mode:
        model.zero_grad()
        model(**batch, mode=mode).loss.backward()
        parts = parts_of(model)
        vision = {name: p for name, p in model.named_parameters() if parts[name] == "vision" and p.requires_grad}
        assert vision
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vision.values() if p.dim() > 1)


def test_the_vision_tower_has_a_learning_rate_of_its_own(stage_inputs, tmp_path):
    before = load_file(stage_inputs / "base/model.safetensors")

    def moved(**recipe):
        after = load_file(
            train_stage(stage_inputs, tmp_path / str(recipe), changed(arguments={"max_steps": 2}, **recipe))
            / "model.safetensors"
        )
        return {name for name in before if "vision_tower" in name and not after[name].equal(before[name])}

    assert not moved()
    assert any("layers.0" in name for name in moved(vision_learning_rate=1.0e-3))
    assert not any("layers.2" in name or "post_layernorm" in name for name in moved(vision_learning_rate=1.0e-3))


def test_square_crops_the_middle_and_pad_keeps_all(tmp_path):
    tiny.llava_processor().save_pretrained(tmp_path)
    wide = Image.new("RGB", (56, 28), "black")
    wide.paste((255, 255, 255), (0, 0, 14, 28))  # what a crop of the middle doesn't see
    shown = {}
    for name in ("square", "pad"):
        processor = load_processor(tmp_path, "turns", name)
        processor.save_pretrained(tmp_path / name)
        again = AutoProcessor.from_pretrained(tmp_path / name)
        shown[name] = again.image_processor(wide, return_tensors="pt").pixel_values
        assert_close(shown[name], processor.image_processor(wide, return_tensors="pt").pixel_values)
    assert shown["square"].shape == shown["pad"].shape == (1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    assert shown["square"].unique().numel() == 3  # black, in three channels
    assert shown["pad"][0, :, 14, 1].min() > 1.5  # the white edge, below a border in the mean colour
    assert shown["pad"][0, :, 0, 0].abs().max() < 0.02


def test_a_handling_of_pictures_that_a_model_lacks_is_refused(tmp_path):
    tiny.llava_processor().save_pretrained(tmp_path / "llava")
    tiny.llava_next_processor().save_pretrained(tmp_path / "next")
    load_processor(tmp_path / "next", "turns", "anyres")
    with pytest.raises(ConfigError, match="'anyres' is not for a LlavaProcessor; valid: pad or square"):
        load_processor(tmp_path / "llava", "turns", "anyres")
    with pytest.raises(ConfigError, match="'pad' is not for a LlavaNextProcessor; valid: anyres"):
        load_processor(tmp_path / "next", "turns", "pad")


@pytest.mark.parametrize("ratio, column", [(1.0, "num_tokens"), (0.1, "num_pruned_tokens")])
def test_batches_are_grouped_by_the_length_that_most_steps_see(ratio, column):
    rows = Dataset.from_dict({"num_tokens": [700, 650, 100], "num_image_tokens": [576, 576, 0]})
    method = DualSpeedConfig(slow_mode_ratio=ratio)
    grouped, name = group_lengths(rows, method)
    expected = [700, 650, 100] if ratio == 1 else [700 - 576 + 57 + 4, 650 - 576 + 57 + 4, 100]
    assert (name, grouped[name][:]) == (column, expected)


def test_grouped_training_runs_on_pruned_lengths(stage_inputs, tmp_path):
    rows = load_from_disk(stage_inputs / "data")
    sizes = [tiny.NUM_IMAGE_TOKENS * len(images) for images in rows["images"][:]]
    rows.add_column("num_image_tokens", sizes).save_to_disk(tmp_path / "data")
    chosen = changed(arguments={"train_sampling_strategy": "group_by_length", "max_steps": 2})
    train(chosen, stage_inputs / "base", tmp_path / "data", tmp_path / "state", tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").is_file()
