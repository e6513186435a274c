"""Planning: each part of the arithmetic against what the real thing measures."""

import pytest
import tiny
import torch
from batches import IMAGE_TOKEN
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaNextConfig, LlavaNextForConditionalGeneration

from dualspeed import DualSpeedConfig, DualSpeedModel
from dualspeed.adapters import add_adapters
from dualspeed.efficiency import count_flops, training_steps
from dualspeed.plan.flops import Sample, Trained, step_flops
from dualspeed.plan.shapes import make_shape
from dualspeed.recipe import LoraRecipe
from dualspeed.stages import set_trainable

SIZES = [(28, 28), (20, 60), (61, 20), (30, 50), (200, 90), (33, 64), (64, 48)]
VISION = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "image_size": 56, "patch_size": 7}
TEXT = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "vocab_size": 1000}
GRIDS = [[56, 112], [112, 56], [112, 112]]
NUM_TEXT, NUM_SUPERVISED, BATCH = 40, 12, 2


def model_of(family: str):
    config, model = {
        "llava": (LlavaConfig, LlavaForConditionalGeneration),
        "llava_next": (LlavaNextConfig, LlavaNextForConditionalGeneration),
    }[family]
    grids = {"image_grid_pinpoints": GRIDS} if family == "llava_next" else {}
    vision = VISION | {"model_type": "clip_vision_model", "num_attention_heads": 4}
    text = TEXT | {"model_type": "llama"}
    torch.manual_seed(0)
    return model(config(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, **grids))


def shape_of(family: str):
    return make_shape(TEXT, VISION, TEXT["vocab_size"], GRIDS if family == "llava_next" else None)


def batch_of(family: str, size=(112, 112), batch=BATCH, text=NUM_TEXT):
    shape = shape_of(family)
    visual, tiles = shape.visual_tokens(*size), shape.num_tiles(*size)
    row = torch.full((visual + text,), 7)
    row[4 : 4 + visual] = IMAGE_TOKEN
    labels = torch.full_like(row, -100)
    labels[-NUM_SUPERVISED:] = 7
    pixels = torch.randn(batch, tiles, 3, 56, 56) if family == "llava_next" else torch.randn(batch, 3, 56, 56)
    return {
        "input_ids": row.repeat(batch, 1),
        "attention_mask": torch.ones(batch, len(row), dtype=torch.long),
        "labels": labels.repeat(batch, 1),
        "pixel_values": pixels,
    } | ({"image_sizes": torch.tensor([size] * batch)} if family == "llava_next" else {})


def sample_of(family: str, config: DualSpeedConfig, size=(112, 112), text=NUM_TEXT) -> Sample:
    shape = shape_of(family)
    kept = shape.kept_tokens(*size, config.pruning_ratio, config.num_virtual_tokens, config.prune_budget)
    visual = shape.visual_tokens(*size)
    return Sample(
        full_tokens=visual + text,
        fast_tokens=kept + text,
        supervised_tokens=NUM_SUPERVISED,
        visual_tokens=visual,
        tiles=shape.num_tiles(*size),
    )


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_parameters_are_counted_exactly(family):
    assert sum(shape_of(family).parameters.values()) == sum(p.numel() for p in model_of(family).parameters())


@pytest.mark.parametrize("size", SIZES)
def test_visual_tokens_and_tiles_are_those_of_the_processor_and_the_model(size):
    shape = make_shape({}, {"image_size": 28, "patch_size": 7}, 1, tiny.GRID_PINPOINTS)
    found = tiny.llava_next_processor()._get_num_multimodal_tokens(image_sizes=[size])
    assert shape.visual_tokens(*size) == found.num_image_tokens[0]
    model = DualSpeedModel(tiny.llava_next(), DualSpeedConfig(pruning_ratio=0.7, prune_budget="tile"))
    pixels = torch.randn(1, shape.num_tiles(*size), 3, 28, 28)
    images = model._encode({"pixel_values": pixels, "image_sizes": torch.tensor([size])})
    assert [int((images.tiles == tile).sum()) for tile in range(shape.num_tiles(*size))] == shape.tiles(*size)


def test_the_papers_setting_keeps_305_of_2880_tokens():
    shape = make_shape({}, {}, 32_064, [[672, 672]])
    assert sum(shape.tiles(500, 500)) == 2880
    assert shape.kept_tokens(500, 500, 0.9, 4, "tile") == 305
    assert make_shape({}, {}, 32_064, None).kept_tokens(500, 300, 0.9, 4, "image") == 61


TRAININGS = {
    "pretrain": Trained(language=False),
    "finetune": Trained(language=True),
    "finetune with checkpointing": Trained(language=True, checkpointing=True),
    "finetune with vision": Trained(language=True, vision=True),
    "lora": Trained(language=True, lora_rank=16),
}


def stage_of(model: DualSpeedModel, trained: Trained) -> None:
    """Prepare a model as the stage that `trained` describes does."""
    if trained.lora_rank:
        add_adapters(model.vlm, LoraRecipe(rank=trained.lora_rank, dropout=0.0))
    set_trainable(model, "finetune" if trained.language else "pretrain", with_vision=trained.vision)
    if trained.checkpointing:
        model.vlm.get_decoder().activation_checkpointing_enable()  # a frozen tower keeps no activations anyway


@pytest.mark.parametrize("name", TRAININGS)
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_flops_are_within_a_tenth_of_what_torch_counts(family, name):
    trained = TRAININGS[name]
    config = DualSpeedConfig(pruning_ratio=0.75)
    model = DualSpeedModel(model_of(family), config).train()
    stage_of(model, trained)
    steps = training_steps(model, batch_of(family))
    for mode, step in steps.items():
        expected = BATCH * step_flops(shape_of(family), sample_of(family, config), trained, mode)
        assert expected == pytest.approx(count_flops(step), rel=0.03), (mode, expected / count_flops(step))
