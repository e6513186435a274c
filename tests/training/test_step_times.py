"""Measurement of step times on a tiny model: its record, what it runs, and the calls of the pruner that it times."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset, load_from_disk

from dualspeed import DualSpeedConfig, DualSpeedModel, Mode
from dualspeed.errors import ConfigError
from dualspeed.settings.model import ModelConfig, Stages
from dualspeed.settings.recipe import LoraRecipe, Recipe
from dualspeed.settings.speed import SpeedSettings, speed_key
from dualspeed.training.drawn_batches import drawn_batches
from dualspeed.training.stage import load_model, make_trainer
from dualspeed.training.step_times import hold_share, measure_speed, steps_in_turns, time_pruner, timed_stage
from tests.support import tiny
from tests.support.batches import collate, sample
from tests.support.stand_in import NAME, stand_in
from tests.support.steps import training_steps

TIMES = {f"{mode}_{unit}" for mode in ("baseline", "fast", "slow") for unit in ("step_seconds", "flops")}
KEYS = TIMES | {
    *("theory_u", "pruner_seconds", "data_seconds", "peak_memory_bytes", "batch_size", "slow_batch_size"),
    *("gradient_accumulation_steps", "num_processes", "updated_share", "sequence_length", "num_batches", "repeats"),
    *("threads", "precision", "device", "machine"),
}


def recipe(use_cpu: bool = True, **changes) -> Recipe:
    arguments = {"use_cpu": use_cpu, "learning_rate": 1e-3} | changes.pop("training_arguments", {})
    fixed = {"annotations": "unused.json", "images": "unused", "chat_template": "turns", "global_batch_size": 4}
    return Recipe(**fixed | changes, training_arguments=arguments)


def speed(pruner: str = "divprune", num_batches: int = 2, repeats: int = 2, **changes) -> SpeedSettings:
    method = DualSpeedConfig(pruner=pruner, pruning_ratio=0.7)
    return SpeedSettings(dualspeed=method, recipe=recipe(**changes), num_batches=num_batches, repeats=repeats)


def measured(stage_inputs, tmp_path, settings: SpeedSettings, **arguments) -> dict:
    measure_speed(stage_inputs / "base", stage_inputs / "data", tmp_path / "speed.json", settings, **arguments)
    return json.loads((tmp_path / "speed.json").read_text())


def trainer_of(stage_inputs, tmp_path, settings: SpeedSettings, dataset: Dataset | None = None):
    """The trainer that a measurement of `settings` runs."""
    stage = timed_stage(settings, 1)
    model, processor = load_model(stage, stage_inputs / "base")
    dataset = load_from_disk(stage_inputs / "data") if dataset is None else dataset
    return make_trainer(stage, model, processor, dataset, None, tmp_path / "state", 0.0)


@pytest.mark.parametrize("pruner", ["divprune", "visionzip"])
def test_a_measurement_has_every_number(stage_inputs, tmp_path, pruner):
    record = measured(stage_inputs, tmp_path, speed(pruner, per_device_batch_size=2, slow_per_device_batch_size=1))
    assert record.keys() == KEYS
    assert (record["batch_size"], record["slow_batch_size"], record["gradient_accumulation_steps"]) == (2, 1, 2)
    assert (record["num_batches"], record["repeats"], record["threads"]) == (2, 2, 1)
    assert (record["precision"], record["device"], record["updated_share"]) == ("float32", "cpu", 1.0)
    assert record["machine"].endswith(" cores")
    assert all(record[name] > 0 for name in TIMES | {"pruner_seconds", "data_seconds", "sequence_length"})
    assert record["pruner_seconds"] < record["fast_step_seconds"]
    assert record["theory_u"] == record["fast_flops"] / record["baseline_flops"] < 1


def test_modes_take_turns_and_every_mode_is_counted():
    steps = steps_in_turns(num_batches=2, repeats=3)
    timed = [(step.kind, step.batch) for step in steps if step.purpose == "time"]
    turn = ["baseline", "fast", "slow", "pruner"]
    assert timed == [(kind, batch) for _ in range(3) for batch in range(2) for kind in turn]
    assert [step.kind for step in steps if step.purpose == "count"] == 2 * turn[:3]


def test_the_steps_are_those_that_the_recipe_trains(stage_inputs, tmp_path, monkeypatch):
    """Precision, adapters, checkpointing, length and micro-batch sizes, as the model meets them."""
    calls = []
    forward = DualSpeedModel.forward

    def record_call(model, *args, **batch):
        output = forward(model, *args, **batch)
        calls.append((batch["mode"], len(batch["input_ids"]), output.logits.dtype, model))
        assert batch["input_ids"].shape[1] <= 28 < 30
        return output

    monkeypatch.setattr(DualSpeedModel, "forward", record_call)
    chosen = speed(
        per_device_batch_size=2,
        slow_per_device_batch_size=1,
        max_length=28,
        lora=LoraRecipe(rank=2),
        num_batches=1,
        repeats=1,
        training_arguments={"bf16": True, "activation_checkpointing": True},
    )
    assert measured(stage_inputs, tmp_path, chosen)["precision"] == "bfloat16"
    model = calls[0][3]
    assert model.has_adapters and model.is_activation_checkpointing
    assert {dtype for _, _, dtype, _ in calls} == {torch.bfloat16}
    assert {(mode, size) for mode, size, _, _ in calls} == {(Mode.FAST, 2), (Mode.SLOW, 1)}
    num_steps = {Mode.FAST: 4, Mode.SLOW: 6}  # warm-up, timed, of the pruner, counted
    for mode, size in ((Mode.FAST, 2), (Mode.SLOW, 1)):
        assert sum(called == mode for called, *_ in calls) == num_steps[mode] * 4 // size


def test_only_slow_steps_have_a_teacher(stage_inputs, tmp_path, monkeypatch):
    calls = []
    forward = DualSpeedModel.forward

    def record_call(model, *args, **batch):
        output = forward(model, *args, **batch)
        calls.append((batch["mode"], None if output.distillation_loss is None else output.distillation_loss.item() > 0))
        return output

    monkeypatch.setattr(DualSpeedModel, "forward", record_call)
    measured(stage_inputs, tmp_path, speed(num_batches=1, repeats=1))
    turn = [(Mode.SLOW, False), (Mode.FAST, None), (Mode.SLOW, True)]
    assert calls == [*turn, *turn, (Mode.FAST, None), *turn]


def test_batches_are_drawn_as_the_training_draws_them(stage_inputs, tmp_path):
    """Batches of an epoch, of all lengths; Baseline's are the same rows, grouped by their own length."""
    lengths = [{"num_tokens": 100 + 10 * (index % 7), "num_image_tokens": 90 * (index % 2)} for index in range(24)]
    rows = load_from_disk(stage_inputs / "data").remove_columns("num_tokens")
    for name in lengths[0]:
        rows = rows.add_column(name, [length[name] for length in lengths])
    by_length = {"train_sampling_strategy": "group_by_length"}
    for arguments in ({}, by_length):
        drawn = [
            drawn_batches(trainer_of(stage_inputs, tmp_path, speed(training_arguments=arguments), rows), 3)
            for _ in range(2)
        ]
        assert drawn[0] == drawn[1]  # seeded
        batches, baseline = drawn[0]["pruned"], drawn[0]["baseline"]
        assert [len(batch) for batch in batches] == [len(batch) for batch in baseline] == [4, 4, 4]
        totals = [sum(row["num_tokens"] for row in batch) for batch in batches]
        assert totals == sorted(totals) and totals[0] < totals[-1]
        ids = [[row["id"] for batch in way for row in batch] for way in (batches, baseline)]
        assert len(set(ids[0])) == 12 and sorted(ids[0]) == sorted(ids[1])
        if not arguments:
            assert batches == baseline
            continue
        pruned = [row["num_pruned_tokens"] for row in batches[1]]
        assert pruned == sorted(pruned, reverse=True)  # as transformers' sampler has them
        full = [row["num_tokens"] for batch in baseline for row in batch]
        assert full == sorted(full) and batches != baseline


def test_a_dataset_smaller_than_a_batch_is_repeated(stage_inputs, tmp_path):
    rows = load_from_disk(stage_inputs / "data").select(range(3))
    drawn = drawn_batches(trainer_of(stage_inputs, tmp_path, speed(), rows), 2)["pruned"]
    assert [len(batch) for batch in drawn] == [4, 4] and len({row["id"] for row in drawn[0]}) == 3


def test_one_process_of_several_takes_its_share(stage_inputs, tmp_path):
    record = measured(stage_inputs, tmp_path, speed(num_batches=1, repeats=1), num_processes=2, is_sharded=True)
    assert (record["num_processes"], record["batch_size"], record["updated_share"]) == (2, 2, 0.5)
    trainer = trainer_of(stage_inputs, tmp_path, speed(training_arguments={"bf16": True}))
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    hold_share(trainer, 3)
    updated = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
    assert {parameter.dtype for parameter in trained} == {torch.bfloat16}
    share = sum(map(torch.numel, updated)) / sum(map(torch.numel, trained))
    assert 0.25 < share < 0.5


def test_steps_that_do_not_fit_are_one_clear_error(stage_inputs, tmp_path, monkeypatch):
    def run_out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(DualSpeedModel, "forward", run_out_of_memory)
    with pytest.raises(ConfigError, match=r"per_device_batch_size: 4, .* don't fit into the memory of .*; valid: "):
        measured(stage_inputs, tmp_path, speed())
    budgets = speed(tokens_per_batch=60, slow_tokens_per_batch=70)
    with pytest.raises(ConfigError, match=r"tokens_per_batch: 60, slow_tokens_per_batch: 70: .*valid: fewer tokens"):
        measured(stage_inputs, tmp_path, budgets)


def test_steps_divided_by_tokens_are_timed_as_they_train(stage_inputs, tmp_path, monkeypatch):
    parts: list[int] = []

    def noting(model, *args, **inputs):
        parts.append(len(inputs["input_ids"]))
        return forward(model, *args, **inputs)

    forward = DualSpeedModel.forward
    monkeypatch.setattr(DualSpeedModel, "forward", noting)
    record = measured(stage_inputs, tmp_path, speed(tokens_per_batch=50, slow_tokens_per_batch=70))
    assert (record["batch_size"], record["gradient_accumulation_steps"]) == (4, 1)
    assert 0 < max(parts) < 4


def test_rows_share_a_measurement_unless_their_steps_differ():
    def key(method: DualSpeedConfig | None = None, **changes) -> str:
        stages = Stages(pretrain=recipe(), finetune=recipe(**changes))
        return speed_key("tiny", ModelConfig(source="x", stages=stages), method or DualSpeedConfig())

    same = [
        {"training_arguments": {"learning_rate": 1.0, "warmup_steps": 3, "max_steps": 9, "dataloader_num_workers": 2}},
        {"projector_learning_rate": 1e-4},
        {"validation_annotations": "other.json", "validation_steps": 3},
        {"max_dropped_share": 0.5},
    ]
    different = [
        {"training_arguments": {"bf16": True}},
        {"training_arguments": {"activation_checkpointing": True}},
        {"training_arguments": {"train_sampling_strategy": "group_by_length"}},
        {"lora": LoraRecipe(rank=2)},
        {"vision_learning_rate": 1e-6},
        {"max_length": 100},
        {"image_aspect_ratio": "pad"},
        {"per_device_batch_size": 2},
        {"slow_per_device_batch_size": 2},
        {"tokens_per_batch": 4096},
        {"attn_implementation": "eager"},
        {"packing": True, "attn_implementation": "flash_attention_2"},
    ]
    assert {key(**changes) for changes in same} == {key()}
    assert key(DualSpeedConfig(slow_mode_ratio=0.5)) == key()
    assert len({key(), *(key(**changes) for changes in different)}) == 1 + len(different)


def test_it_runs_on_the_accelerator_that_is_there(stage_inputs, tmp_path, monkeypatch):
    seen = set()
    forward = DualSpeedModel.forward

    def record_device(model, *args, **batch):
        seen.add((model.device.type, batch["input_ids"].device.type))
        return forward(model, *args, **batch)

    monkeypatch.setattr(DualSpeedModel, "forward", record_device)
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", f"{NAME}:0")  # accelerate finds only devices that it has a name for
    forget_accelerate()
    try:
        with stand_in():
            record = measured(stage_inputs, tmp_path, speed(use_cpu=False, num_batches=1, repeats=1))
    finally:
        monkeypatch.delenv("ACCELERATE_TORCH_DEVICE")
        forget_accelerate()
    assert seen == {(NAME, NAME)}
    assert (record["device"], record["machine"]) == (NAME, "stand-in")
    expected = measured(stage_inputs, tmp_path, speed(num_batches=1, repeats=1))
    for name in ("baseline_flops", "fast_flops", "slow_flops", "sequence_length"):
        assert record[name] == expected[name]


def forget_accelerate() -> None:
    """Let the next trainer choose its device anew."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def test_each_call_of_the_pruner_is_timed_and_changes_nothing():
    """The pruner runs once in a fast step, once for the teacher of a slow step, and not in Baseline's."""
    model = DualSpeedModel(tiny.llava(), DualSpeedConfig(pruning_ratio=0.5))
    batch = collate([sample("llava", seed, 1) for seed in range(2)])
    steps = training_steps(model, batch)
    num_calls = {}
    for name, step in steps.items():
        with time_pruner(model) as seconds:
            step()
        num_calls[name] = len(seconds)
        assert all(value > 0 for value in seconds)
        step()
        assert len(seconds) == num_calls[name]
    assert num_calls == {"baseline": 0, "fast": 1, "slow": 1}
    expected = model(**batch, mode="fast").loss
    with time_pruner(model):
        assert model(**batch, mode="fast").loss == expected
