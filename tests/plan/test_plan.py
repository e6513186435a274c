"""The plan's arithmetic against measurements: parameters, tokens, FLOPs and memory of real models."""

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaNextConfig, LlavaNextForConditionalGeneration

from dualspeed import DualSpeedConfig, DualSpeedModel, Mode
from dualspeed.cli import main
from dualspeed.errors import ConfigError, PlanError
from dualspeed.method.fast_mode import encode_batch
from dualspeed.method.losses import MANY_LOGITS, cross_entropy, distillation
from dualspeed.plan.costs import Processes, stage_cost
from dualspeed.plan.flops import Sample, Trained, step_flops, trained_parameters, visual_flops
from dualspeed.plan.memory import activation_bytes, logit_bytes, peak_memory
from dualspeed.plan.remedies import possible_changes
from dualspeed.plan.report import lines_of, plan
from dualspeed.plan.shapes import make_shape
from dualspeed.plan.shapes import shape_of as shape_of_model
from dualspeed.settings.plan import GPUS
from dualspeed.settings.project import load_project
from dualspeed.training.step_times import count_flops
from dualspeed.training.trainable import set_trainable
from tests.support import tiny
from tests.support.batches import IMAGE_TOKEN
from tests.support.paths import REPOSITORY
from tests.support.plan import TRAININGS, measured_peak, stage_of, two_steps
from tests.support.steps import training_steps

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
    visual, tiles = shape.visual_tokens(*size), shape.tower.num_tiles(*size)
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
        encoded=shape.encoded(*size),
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
    pixels = torch.randn(1, shape.tower.num_tiles(*size), 3, 28, 28)
    images = encode_batch(model, {"pixel_values": pixels, "image_sizes": torch.tensor([size])})
    num_tiles = shape.tower.num_tiles(*size)
    assert [int((images.tiles == tile).sum()) for tile in range(num_tiles)] == shape.tower.tiles(*size)


def test_the_papers_setting_keeps_305_of_2880_tokens():
    shape = make_shape({}, {}, 32_064, [[672, 672]])
    assert sum(shape.tower.tiles(500, 500)) == 2880
    assert shape.kept_tokens(500, 500, 0.9, 4, "tile") == 305
    assert make_shape({}, {}, 32_064, None).kept_tokens(500, 300, 0.9, 4, "image") == 61


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


@pytest.mark.parametrize("name", TRAININGS)
def test_trained_parameters_are_counted_exactly(name):
    model = DualSpeedModel(model_of("llava_next"), DualSpeedConfig(num_virtual_tokens=0))
    stage_of(model, TRAININGS[name])
    counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # The tower's last block and its final norm never run, so they aren't trained.
    idle = model.vlm.model.vision_tower.encoder.layers[-1], model.vlm.model.vision_tower.post_layernorm
    unused = sum(p.numel() for module in idle for p in module.parameters()) if TRAININGS[name].vision else 0
    assert trained_parameters(shape_of("llava_next"), TRAININGS[name]) == counted + unused


MEMORY_BATCH, MEMORY_TEXT = 8, 300


def memory_case(trained: Trained):
    """Model in bfloat16, a batch whose activations take most of the memory, and the lengths of its samples."""
    config = DualSpeedConfig(pruning_ratio=0.75)
    model = DualSpeedModel(model_of("llava").to(torch.bfloat16), config).train()
    stage_of(model, trained)
    batch = batch_of("llava", batch=MEMORY_BATCH, text=MEMORY_TEXT)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    return model, batch, sample_of("llava", config, text=MEMORY_TEXT)


@pytest.mark.parametrize("mode", ["baseline", "fast"])
@pytest.mark.parametrize("name", ["finetune", "finetune with checkpointing"])
def test_memory_of_bfloat16_weights_is_within_a_tenth_of_what_is_measured(name, mode):
    # A process of FSDP2 or ZeRO computes like this; its weights and optimizer are counted elsewhere.
    trained = TRAININGS[name]
    model, batch, sample = memory_case(trained)

    def step():
        model(**batch, mode=Mode.FAST if mode == "fast" else Mode.SLOW, distill=False).loss.backward()
        model.zero_grad()

    step()
    begins, ends = activation_bytes(shape_of("llava"), sample, trained, mode, MEMORY_BATCH)
    num_gradients = trained_parameters(shape_of("llava"), trained) - TEXT["vocab_size"] * TEXT["hidden_size"]
    assert max(begins, ends + 2 * num_gradients) == pytest.approx(measured_peak(step), rel=0.1)


@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_memory_of_logits_is_within_a_tenth_of_what_is_measured(mode):
    num_tokens, vocabulary, width = 160, 8192, 32
    states, head = (torch.randn(count, width, dtype=torch.bfloat16) for count in (num_tokens, vocabulary))
    labels = torch.randint(vocabulary, (num_tokens,))
    assert num_tokens * vocabulary > MANY_LOGITS

    def step():
        leaf = states.clone().requires_grad_()
        teacher = states @ head.T if mode == "slow" else None
        logits = leaf @ head.T
        loss = cross_entropy(logits, labels, num_tokens)
        if teacher is not None:
            loss = loss + distillation(logits, teacher, temperature=1.0, num_items=num_tokens)
            del teacher
        loss.backward()
        return logits  # as a model's output, which holds them

    assert logit_bytes(mode) == pytest.approx(measured_peak(step) / (num_tokens * vocabulary), rel=0.1)


@pytest.mark.parametrize("mode", ["baseline", "fast"])
@pytest.mark.parametrize("name", ["pretrain", "lora", "finetune"])
def test_memory_of_a_whole_training_is_within_a_tenth_of_what_is_measured(name, mode):
    # Weights, optimizer, gradients and activations of a process without sharding.
    trained = TRAININGS[name]
    template, batch, sample = memory_case(trained)

    expected = peak_memory(
        shape_of("llava"), sample, trained, {mode: MEMORY_BATCH}, sharding="ddp", num_gpus=1, accumulates=False
    )
    assert expected.total == pytest.approx(measured_peak(lambda: two_steps(template, batch, mode)), rel=0.1)


@pytest.mark.parametrize("sharding", ["zero2", "zero3", "fsdp2"])
def test_sharding_divides_what_it_shares(sharding):
    shape, trained = make_shape({}, {}, 32_064, None), Trained(language=True, checkpointing=True)
    sample = Sample(
        full_tokens=700, fast_tokens=200, supervised_tokens=50, visual_tokens=576, encoded=shape.encoded(1, 1)
    )

    def peak(num_gpus):
        return peak_memory(shape, sample, trained, {"fast": 4}, sharding, num_gpus, accumulates=True)

    few, many = peak(8), peak(16)
    assert few.optimizer == 2 * many.optimizer
    assert few.activations == many.activations
    assert (few.weights == many.weights) == (sharding == "zero2")
    # Sixteen bytes for each of 6.7 billion parameters: weights, gradients, two moments, all in float32.
    assert 8 * (few.optimizer + few.gradients) + 4 * trained_parameters(shape, trained) > 100e9


@pytest.fixture
def in_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


def test_the_papers_rows_fit_and_cost_what_llava_says(in_repository, capsys):
    assert main(["plan", "--config", "config/paper"]) == 0
    table = capsys.readouterr().out
    assert main(["plan", "--config", "config/paper", "--experiments", "config/paper/experiments-lora.tsv"]) == 0
    assert table.count("| finetune ") == len(load_project("config/paper/config.yaml").rows)
    lines = {(line.name, line.settings.stage): line.cost for line in lines_of(load_project("config/paper/config.yaml"))}
    baseline = lines["llava-1.5-7b-baseline", "pretrain"]
    assert baseline.processes == Processes(num_gpus=8, sharding="ddp")
    assert baseline.lengths.samples == 558_128
    assert baseline.lengths.mean("full_tokens") == 576 + 30
    fast = lines["llava-next-7b-dualspeed-divprune-p0.9", "finetune"]
    assert fast.baseline_flops > 3 * fast.flops


def test_no_pruning_ratio_exceeds_the_cap(in_repository):
    """It is the speedup where almost nothing is kept; the tower's share is smaller, the more is kept."""
    project = load_project("config/paper/config.yaml")
    row = next(row for row in project.rows if row.id == "llava-next-7b-dualspeed-divprune-p0.9")
    settings = project.finetune_settings(row)
    shares = []
    for ratio in (0.5, 0.9, 0.9999):
        method = dataclasses.replace(
            settings.dualspeed, pruning_ratio=ratio, num_virtual_tokens=0, prune_budget="image"
        )
        cost = stage_cost(project, dataclasses.replace(settings, dualspeed=method), row.model)
        assert cost.baseline_flops < cost.cap * cost.flops
        shares.append(cost.tower_share)
    assert cost.baseline_flops / cost.flops == pytest.approx(cost.cap, rel=0.01)
    assert 0 < shares[0] < shares[1] < shares[2] < 1


def test_the_towers_share_is_that_of_the_flops_that_torch_counts():
    shape, trained = shape_of("llava"), Trained(language=True)
    batch = batch_of("llava")
    model = DualSpeedModel(model_of("llava"), DualSpeedConfig())
    set_trainable(model, "finetune")
    sample = Sample(full_tokens=0, fast_tokens=0, supervised_tokens=0, visual_tokens=64, encoded=shape.encoded(1, 1))

    def encode() -> None:
        torch.cat(encode_batch(model, {"pixel_values": batch["pixel_values"]}).features).sum().backward()

    assert BATCH * visual_flops(sample, trained) == pytest.approx(count_flops(encode), rel=0.01)


def test_families_whose_sizes_it_does_not_know_are_refused(in_repository, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl_moe", "text_config": {}, "vision_config": {}}')
    project = load_project("config/paper/config.yaml")
    model = dataclasses.replace(project.models["llava-1.5-7b"], source=str(tmp_path), parts=None)
    with pytest.raises(
        ConfigError, match=r"costs follow from the sizes of llava or .* or qwen3_vl, and this is 'qwen3_vl_moe'"
    ):
        shape_of_model(model, project.downloads)


def test_a_row_that_cannot_fit_is_refused_with_what_would(in_repository, tmp_path):
    text = Path("config/paper/config.yaml").read_text()
    assert "accelerate_config: config/accelerate/fsdp2.yaml" in text
    (tmp_path / "config.yaml").write_text(text.replace("accelerate_config: config/accelerate/fsdp2.yaml", ""))
    with pytest.raises(PlanError) as raised:
        plan(tmp_path)
    refused = [line for line in str(raised.value).split("\n") if "llava-1.5-7b-baseline: finetune: needs" in line]
    assert len(refused) == 1
    assert refused[0].endswith("GB)") and "accelerate_config: config/accelerate/fsdp2.yaml would fit (" in refused[0]


def test_rows_that_fit_80_gb_are_refused_on_40_with_what_would_fit(in_repository, tmp_path):
    text = Path("config/paper/config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("  gpu: a100\n", "  gpu: a100-40g\n"))
    with pytest.raises(PlanError) as raised:
        plan(tmp_path)
    refused = [line for line in str(raised.value).split("\n") if "an A100-40G has 40; " in line]
    assert refused and all("would fit" in line for line in refused)
    assert any("plan.gpu: a100 or h100 or h200 would fit" in line for line in refused)
    project = load_project("config/paper/config.yaml")
    (row,) = (row for row in project.rows if row.id == "llava-1.5-7b-naive_prune-divprune-p0.9")
    needed = stage_cost(project, project.finetune_settings(row), row.model).memory
    assert any(f"{row.id}: finetune: needs {needed / 1e9:.0f} GB" in line for line in refused)
    assert not any("llava-1.5-7b-baseline: finetune" in line for line in refused)


def test_a_row_fits_only_with_a_margin(in_repository):
    project = load_project("config/paper/config.yaml")
    cost = stage_cost(project, project.finetune_settings(project.rows[0]), project.rows[0].model)
    gpu = dataclasses.replace(GPUS["a100"], memory=1.05 * cost.memory)
    assert not cost.fits(gpu)
    assert cost.fits(dataclasses.replace(gpu, memory=1.11 * cost.memory))


def test_lengths_are_counted_once_data_is_prepared(in_repository, tmp_path):
    project = dataclasses.replace(load_project("config/paper/config.yaml"), results=str(tmp_path))
    row = project.rows[0]
    assert not stage_cost(project, project.finetune_settings(row), row.model).lengths.is_counted
    folder = tmp_path / "prepared" / row.model / "finetune"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"num_samples": 1000, "num_tokens": 700000}')
    lengths = stage_cost(project, project.finetune_settings(row), row.model).lengths
    assert lengths.is_counted and lengths.samples == 1000
    assert lengths.mean("full_tokens") == pytest.approx(700, abs=1)


def test_a_dataset_of_unknown_lengths_is_one_clear_error(in_repository, tmp_path, capsys):
    text = Path("config/paper/config.yaml").read_text().replace("    data/llava-next-data/data:", "    other:")
    (tmp_path / "config.yaml").write_text(text)
    assert main(["plan", "--config", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "plan.datasets: no entry for 'data/llava-next-data/data'" in message


def test_batches_by_tokens_need_the_memory_of_their_budget(in_repository):
    """2,048 tokens are the longest sample of a Baseline: four of them fit into 8,192 or a few more."""
    project = load_project("config/paper/config.yaml")
    row = next(row for row in project.rows if row.id == "llava-1.5-7b-baseline")
    settings = project.finetune_settings(row)

    def peak(**sizes):
        sizes = {"per_device_batch_size": None, "slow_per_device_batch_size": None} | sizes
        recipe = dataclasses.replace(settings.recipe, **sizes)
        return stage_cost(project, dataclasses.replace(settings, recipe=recipe), row.model).peak

    four = peak(per_device_batch_size=4)
    assert peak(tokens_per_batch=2048, slow_tokens_per_batch=8200) == peak(tokens_per_batch=8192) == four
    assert peak(per_device_batch_size=2) == peak(tokens_per_batch=4096) != four
    recipe = dataclasses.replace(
        settings.recipe, per_device_batch_size=None, slow_per_device_batch_size=None, tokens_per_batch=8192
    )
    changes = list(possible_changes(dataclasses.replace(settings, recipe=recipe), 8))
    (halve,) = (change for name, change in changes if name == "tokens_per_batch: 4096 and slow_tokens_per_batch: 4096")
    assert halve(recipe).token_budgets == {"fast": 4096, "slow": 4096}
    assert not any(name.startswith("per_device_batch_size") for name, _ in changes)
