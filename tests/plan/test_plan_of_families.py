"""The plan's arithmetic for VLMs that come finished: real models and processors.

Families: Qwen2.5-VL, Qwen3-VL, Idefics3 and SmolVLM.
"""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Idefics3Config,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
    SmolVLMConfig,
)
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig, Qwen3VLVisionConfig

from dualspeed import DualSpeedConfig, DualSpeedModel
from dualspeed.errors import ConfigError
from dualspeed.method.fast_mode import encode_batch
from dualspeed.plan.flops import Sample, step_flops, trained_parameters, visual_flops
from dualspeed.plan.memory import peak_memory
from dualspeed.plan.published import IMAGE_DEFAULTS, TEXT_DEFAULTS, VISION_DEFAULTS, VLMS
from dualspeed.plan.report import lines_of
from dualspeed.plan.shapes import shape_of, shape_of_vlm
from dualspeed.settings.families import TowerKind
from dualspeed.settings.plan import GPUS, DatasetEstimate
from dualspeed.settings.project import load_project
from dualspeed.training.step_times import count_flops
from tests.support.batches import IMAGE_TOKEN
from tests.support.paths import REPOSITORY
from tests.support.plan import TRAININGS, measured_peak, stage_of, two_steps
from tests.support.steps import training_steps
from tests.support.tiny_chat import tiny_processor

TEXT = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "vocab_size": 1000, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
WINDOWED = {"depth": 4, "hidden_size": 64, "intermediate_size": 160, "num_heads": 4, "patch_size": 7}
WINDOWED |= {"out_hidden_size": 128, "window_size": 28, "fullatt_block_indexes": [1, 3]}
# Heads are wider than a fourth of the hidden size, as they are in the published sizes.
TEXT_OF_WIDE_HEADS = TEXT | {"head_dim": 48, "rope_parameters": ROPE | {"mrope_section": [8, 8, 8]}}
STACKED = {"depth": 4, "hidden_size": 64, "intermediate_size": 256, "num_heads": 4, "patch_size": 7}
STACKED |= {"out_hidden_size": 128, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 2]}
TILED = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
TILED |= {"image_size": 28, "patch_size": 7}
CONFIGS = {
    "qwen2_5_vl": lambda: Qwen2_5_VLConfig(
        vision_config=WINDOWED, text_config=TEXT | {"rope_parameters": ROPE}, image_token_id=IMAGE_TOKEN
    ),
    "qwen3_vl": lambda: Qwen3VLConfig(
        vision_config=STACKED, text_config=TEXT_OF_WIDE_HEADS, image_token_id=IMAGE_TOKEN, tie_word_embeddings=True
    ),
    "idefics3": lambda: Idefics3Config(
        vision_config=TILED, text_config=TEXT | {"model_type": "llama"}, image_token_id=IMAGE_TOKEN, scale_factor=2
    ),
    "smolvlm": lambda: SmolVLMConfig(
        vision_config=TILED, text_config=TEXT | {"model_type": "llama"}, image_token_id=IMAGE_TOKEN, scale_factor=2
    ),
}
PIXELS = {"shortest_edge": 4 * 14**2, "longest_edge": 60 * 14**2}
PROCESSORS = {
    "qwen2_5_vl": lambda: Qwen2VLImageProcessorPil(patch_size=7, merge_size=2, size=PIXELS),
    "idefics3": lambda: Idefics3ImageProcessorPil(size={"longest_edge": 112}, max_image_size={"longest_edge": 28}),
}
PROCESSORS["qwen3_vl"] = PROCESSORS["qwen2_5_vl"]
PROCESSORS["smolvlm"] = PROCESSORS["idefics3"]
ANY_RESOLUTION = ("qwen2_5_vl", "qwen3_vl")
"""Families whose images have no tiles."""
SIZES = [(70, 98), (98, 71), (28, 28), (33, 120), (300, 500), (113, 37), (480, 640)]
NUM_TEXT, NUM_SUPERVISED, BATCH = 40, 12, 2


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture(params=["qwen2_5_vl", "qwen3_vl", "idefics3"])
def checkpoint(request, tmp_path):
    """A family, and its shape as the plan reads it from a folder with configuration and processor."""
    return request.param, read_shape(request.param, tmp_path)


def read_shape(family: str, folder):
    """Shape of a model of config/single-gpu whose source is a folder with a tiny checkpoint, without weights."""
    CONFIGS[family]().save_pretrained(folder)
    PROCESSORS[family]().save_pretrained(folder)
    model = load_project("config/single-gpu/config.yaml").models["smolvlm-256m"]
    return shape_of(dataclasses.replace(model, source=str(folder)), {})


def test_smolvlm_has_the_costs_of_idefics3(tmp_path):
    assert read_shape("smolvlm", tmp_path / "one") == read_shape("idefics3", tmp_path / "other")
    parameters = sum(read_shape("smolvlm", tmp_path / "one").parameters.values())
    assert parameters == sum(p.numel() for p in model_of("smolvlm").parameters())


def model_of(family: str):
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(CONFIGS[family]())


def images_of(family: str, size, batch: int):
    """Processor's output for a batch of equal images."""
    picture = torch.randint(0, 255, (size[0], size[1], 3), dtype=torch.uint8).numpy()
    pictures = [picture] * batch if family in ANY_RESOLUTION else [[picture]] * batch
    return {name: value for name, value in PROCESSORS[family]()(images=pictures, return_tensors="pt").items()}


def batch_of(family: str, shape, size, batch=BATCH, text=NUM_TEXT):
    row, markers = [], shape.tower.markers(*size)
    for unit in shape.tower.units(*size, "image"):
        row += [IMAGE_TOKEN] * unit + [7]
    row += [7] * (markers - len(shape.tower.units(*size, "image")) + text)
    ids = torch.tensor(row).repeat(batch, 1)
    labels = torch.full_like(ids, -100)
    labels[:, -NUM_SUPERVISED:] = 7
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    types = {"mm_token_type_ids": (ids == IMAGE_TOKEN).long()} if family in ANY_RESOLUTION else {}
    return inputs | types | images_of(family, size, batch)


def sample_of(shape, config: DualSpeedConfig, size, text=NUM_TEXT) -> Sample:
    visual, markers = shape.visual_tokens(*size), shape.tower.markers(*size)
    kept = shape.kept_tokens(*size, config.pruning_ratio, config.num_virtual_tokens, config.prune_budget)
    return Sample(
        full_tokens=visual + markers + text,
        fast_tokens=kept + markers + text,
        supervised_tokens=NUM_SUPERVISED,
        visual_tokens=visual,
        encoded=shape.encoded(*size),
    )


def test_parameters_are_counted_exactly(checkpoint):
    family, shape = checkpoint
    model = model_of(family)
    assert sum(shape.parameters.values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", TRAININGS)
def test_trained_parameters_are_counted_exactly(checkpoint, name):
    family, shape = checkpoint
    model = DualSpeedModel(model_of(family), DualSpeedConfig(num_virtual_tokens=0))
    stage_of(model, TRAININGS[name])
    assert trained_parameters(shape, TRAININGS[name]) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("size", SIZES)
def test_visual_tokens_are_those_of_the_processor(checkpoint, size):
    family, shape = checkpoint
    if family in ANY_RESOLUTION:
        patches = images_of(family, size, 1)["image_grid_thw"].prod()
        assert shape.tower.units(*size, "image") == [int(patches) // 4]
        return
    tiles = images_of(family, size, 1)["pixel_values"].shape[1]
    assert shape.tower.units(*size, "image") == shape.tower.units(*size, "tile") == [4] * tiles
    assert shape.visual_tokens(*shape.tower.largest(size)) >= shape.visual_tokens(*size)


@pytest.mark.parametrize("name, size", list(zip(TRAININGS, [(98, 84), (70, 98)] * 3, strict=False)))
def test_flops_are_within_a_tenth_of_what_torch_counts(checkpoint, name, size):
    family, shape = checkpoint
    config = DualSpeedConfig(pruning_ratio=0.75)
    model = DualSpeedModel(model_of(family), config).train()
    stage_of(model, TRAININGS[name])
    for mode, step in training_steps(model, batch_of(family, shape, size)).items():
        expected = BATCH * step_flops(shape, sample_of(shape, config, size), TRAININGS[name], mode)
        assert expected == pytest.approx(count_flops(step), rel=0.05), (mode, expected / count_flops(step))


def test_the_towers_share_is_that_of_the_flops_that_torch_counts(checkpoint):
    family, shape = checkpoint
    size, trained = (98, 84), TRAININGS["finetune"]
    model = DualSpeedModel(model_of(family), DualSpeedConfig())
    stage_of(model, trained)
    images = images_of(family, size, BATCH)

    def encode() -> None:
        torch.cat(encode_batch(model, images).all_features()).sum().backward()

    expected = BATCH * visual_flops(sample_of(shape, DualSpeedConfig(), size), trained)
    assert expected == pytest.approx(count_flops(encode), rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["baseline", "fast"])
@pytest.mark.parametrize("name", ["lora", "finetune"])
def test_memory_of_a_whole_training_is_within_a_tenth_of_what_is_measured(checkpoint, name, mode):
    family, shape = checkpoint
    trained, config, size, batch_size, text = TRAININGS[name], DualSpeedConfig(pruning_ratio=0.75), (98, 84), 8, 300
    template = DualSpeedModel(model_of(family).to(torch.bfloat16), config).train()
    stage_of(template, trained)
    batch = batch_of(family, shape, size, batch_size, text)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()

    sample = sample_of(shape, config, size, text)
    planned = peak_memory(shape, sample, trained, {mode: batch_size}, sharding="ddp", num_gpus=1, accumulates=False)
    assert planned.total == pytest.approx(measured_peak(lambda: two_steps(template, batch, mode)), rel=0.1)


MODEL_TYPES = {"Qwen/Qwen2.5-VL-3B-Instruct": "qwen2_5_vl", "HuggingFaceTB/SmolVLM-256M-Instruct": "idefics3"}
MODEL_TYPES["Qwen/Qwen3-VL-4B-Instruct"] = "qwen3_vl"


@pytest.mark.parametrize("name", MODEL_TYPES)
def test_published_sizes_are_those_of_the_model_that_transformers_makes_of_them(name):
    with torch.device("meta"):
        config = AutoConfig.for_model(MODEL_TYPES[name], **copy.deepcopy(VLMS[name].config))
        model = AutoModelForImageTextToText.from_config(config)
        model.tie_weights()
    assert sum(shape_of_vlm(VLMS[name]).parameters.values()) == sum(p.numel() for p in model.parameters())


def test_what_a_configuration_leaves_out_has_transformers_defaults():
    defaults = {TowerKind.SHUFFLED: Idefics3VisionConfig(), TowerKind.WINDOWS: Qwen2_5_VLVisionConfig()}
    defaults[TowerKind.DEEPSTACK] = Qwen3VLVisionConfig()
    for kind, config in defaults.items():
        found = {name: getattr(config, name) for name in VISION_DEFAULTS[kind]}
        assert json.loads(json.dumps(found)) == VISION_DEFAULTS[kind]
    texts = {TowerKind.WINDOWS: Qwen2_5_VLTextConfig(), TowerKind.DEEPSTACK: Qwen3VLTextConfig()}
    for kind, text in texts.items():
        assert {name: getattr(text, name) for name in TEXT_DEFAULTS[kind]} == TEXT_DEFAULTS[kind]
        assert dict(Qwen2VLImageProcessorPil().size) == IMAGE_DEFAULTS[kind]["size"]
    assert dict(Idefics3ImageProcessorPil().size) == IMAGE_DEFAULTS[TowerKind.SHUFFLED]["size"]


def test_the_evening_fits_a_gpu_of_24_gb_and_no_stage_but_finetuning_is_planned():
    project = load_project("config/single-gpu/config.yaml")
    lines = lines_of(project)
    assert [(line.name, line.settings.stage) for line in lines] == [(row.id, "finetune") for row in project.rows]
    assert all(line.cost.fits(GPUS["rtx4090"]) for line in lines)
    assert sum(line.cost.hours(GPUS["rtx4090"], project.plan.utilisation) for line in lines) < 6
    costs = {line.name: line.cost for line in lines}
    for model, (tower, cap) in {"qwen2.5-vl-3b": (0.62, 3.30), "smolvlm-256m": (0.95, 1.32)}.items():
        cost = costs[f"{model}-naive_prune-divprune-p0.9"]
        assert (cost.tower_share, cost.cap) == (pytest.approx(tower, abs=0.01), pytest.approx(cap, abs=0.01))
        assert cost.baseline_flops < cost.cap * cost.flops
    # One image of 576 x 768: 21 x 27 tokens; 4 x 3 tiles of 64, the view of the whole, and what stands around them.
    assert costs["qwen2.5-vl-3b-baseline"].lengths.mean("full_tokens") == 100 + 21 * 27 + 2
    assert costs["smolvlm-256m-baseline"].lengths.mean("full_tokens") == 100 + 13 * 64 + 12 * 2 + 3 + 3


def test_an_image_that_no_sample_has_room_for_is_refused():
    project = load_project("config/single-gpu/config.yaml")
    (name,) = project.plan.datasets
    estimate = dataclasses.replace(project.plan.datasets[name], image_size=(1600, 1600))
    project = dataclasses.replace(project, plan=dataclasses.replace(project.plan, datasets={name: estimate}))
    with pytest.raises(
        ConfigError, match=r"max_length: 2048, and an image of 1600 x 1600 pixels has 3251 tokens; valid"
    ):
        lines_of(project)


@pytest.mark.parametrize("name", ["image_size", "largest_image_size"])
def test_sizes_of_images_are_pairs_of_pixels(name):
    with pytest.raises(ConfigError, match=rf"{name}: \(0, 3\); valid: height and width in pixels"):
        DatasetEstimate(samples=1, text_tokens=1, supervised_tokens=1, **{name: (0, 3)})


def test_the_readme_has_the_hours_of_the_plan():
    project = load_project("config/single-gpu/config.yaml")
    lines = lines_of(project)
    gpus = [GPUS[name] for name in ("rtx4090", "a100", "h100")]
    hours = [[line.cost.hours(gpu, project.plan.utilisation) for gpu in gpus] for line in lines]
    expected = []
    for line, values in zip(lines, hours, strict=True):
        cost = line.cost
        prunes = line.settings.dualspeed.slow_mode_ratio < 1
        tower = (f"{cost.tower_share:.0%}", f"{cost.cap:.2f}") if prunes else ("-", "-")
        cells = [f"{value:.1f}" for value in values], f"{cost.baseline_flops / cost.flops:.2f}", *tower
        expected.append([line.name, *cells[0], *cells[1:], f"{cost.memory / 1e9:.0f}"])
    expected.append(["all", *(f"{sum(column):.1f}" for column in zip(*hours, strict=True)), *[""] * 4])
    assert table_in("config/single-gpu/README.md", "hours") == expected


def test_the_papers_readme_has_the_costs_of_its_rows_with_a_number_of_slow_steps():
    lines = lines_of(load_project("config/paper/config.yaml", experiments="config/paper/experiments-slow-steps.tsv"))
    expected = [
        [
            line.name,
            f"{line.cost.flops / 1e18:.1f}",
            f"{line.cost.baseline_flops / line.cost.flops:.2f}",
            f"{line.cost.cap:.2f}" if line.settings.dualspeed.slow_mode_ratio < 1 else "-",
        ]
        for line in lines
        if line.settings.stage == "finetune"
    ]
    assert len(expected) == 15
    assert table_in("config/paper/README.md", "slow-steps") == expected


def table_in(readme: str, name: str) -> list[list[str]]:
    """Cells of the table that ends in a comment `<!-- NAME:end -->`, without its head."""
    before, end, _ = Path(readme).read_text().partition(f"<!-- {name}:end -->")
    assert end
    rows = before.rpartition("|---|")[2].splitlines()[1:]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]


@pytest.mark.parametrize("size", SIZES)
def test_tokens_around_the_tiles_are_those_that_the_processor_writes(size, tmp_path):
    shape = read_shape("idefics3", tmp_path)
    processor = tiny_processor("idefics3")
    processor.image_processor.size = PROCESSORS["idefics3"]().size
    found = processor._get_num_multimodal_tokens(image_sizes=[size]).num_image_tokens[0]
    breaks = len(processor.tokenizer("\n\n")["input_ids"]) - 1 if shape.tower.rows_and_columns(*size)[0] else 0
    assert shape.visual_tokens(*size) + shape.tower.markers(*size) == found - breaks
