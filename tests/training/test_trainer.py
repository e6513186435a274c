"""DualSpeedTrainer on a random LLaVA: modes, resuming, parameter groups, saved files."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments

from dualspeed import DualSpeedConfig, DualSpeedModel, DualSpeedTrainer, Mode
from dualspeed.errors import ConfigError
from dualspeed.settings.modes import MODE_SCHEDULES, mode_of_step
from dualspeed.training.trainable import parts_of, set_trainable
from tests.support import tiny
from tests.support.batches import collate, sample
from tests.support.golden import CASES, batch, golden_model

NUM_STEPS = 8
OWN = ("projector_learning_rate", "vision_learning_rate", "slow_batch_size")


def collate_rows(rows: list[dict]) -> dict[str, torch.Tensor]:
    return collate([sample("llava", row["seed"], row["num_images"]) for row in rows])


def dataset(num_samples: int = 32) -> Dataset:
    return Dataset.from_list([{"seed": seed, "num_images": seed % 3} for seed in range(num_samples)])


def trainer(folder, model=None, dualspeed: DualSpeedConfig | None = None, **arguments) -> DualSpeedTrainer:
    own = {name: arguments.pop(name, None) for name in OWN}
    defaults = {
        "output_dir": str(folder),
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return DualSpeedTrainer(
        model=tiny.llava(dropout=0.1) if model is None else model,
        args=TrainingArguments(**(defaults | arguments)),
        dualspeed=dualspeed or DualSpeedConfig(slow_mode_ratio=0.4, pruning_ratio=0.7, pruner="random"),
        **own,
        train_dataset=dataset(),
        eval_dataset=dataset(6),
        data_collator=collate_rows,
    )


def losses(trained: DualSpeedTrainer) -> list[dict[str, float]]:
    """Losses of each step, by mode."""
    keep = ("step", "loss", "fast/ce_loss", "slow/ce_loss", "slow/distillation_loss")
    return [{key: entry[key] for key in keep if key in entry} for entry in trained.state.log_history if "loss" in entry]


def test_modes_are_the_same_in_another_process():
    printing = "print([m(7, t, 0.3, s) for s in {} for t in range(200)])"
    code = f"from dualspeed.settings.modes import mode_of_step as m; {printing}"
    printed = subprocess.run(
        [sys.executable, "-c", code.format(list(MODE_SCHEDULES))], capture_output=True, text=True, check=True
    ).stdout
    here = [mode_of_step(7, step, 0.3, schedule) for schedule in MODE_SCHEDULES for step in range(200)]
    assert printed.strip() == str(here)


@pytest.mark.parametrize("schedule", MODE_SCHEDULES)
@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_extreme_ratios_have_one_mode(schedule, ratio):
    modes = {mode_of_step(0, step, ratio, schedule) for step in range(1000)}
    assert modes == {Mode.SLOW if ratio == 1 else Mode.FAST}


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.3, 0.7])
def test_schedules_have_their_ratio(ratio):
    for seed in range(3):
        stratified = [mode_of_step(seed, step, ratio, "stratified") is Mode.SLOW for step in range(1000)]
        for count in (1, 10, 77, 1000):
            assert abs(sum(stratified[:count]) - count * ratio) <= 1 + 1e-9
        drawn = sum(mode_of_step(seed, step, ratio) is Mode.SLOW for step in range(10_000))
        assert abs(drawn - 10_000 * ratio) < 5 * (10_000 * ratio * (1 - ratio)) ** 0.5


def test_slow_steps_are_dealt_out_exactly_whatever_interrupts_them(tmp_path):
    config = DualSpeedConfig(slow_steps=3, pruning_ratio=0.7, pruner="random")
    whole = trainer(tmp_path / "whole", dualspeed=config)
    whole.train()
    assert sum("slow/ce_loss" in entry for entry in losses(whole)) == 3
    trainer(tmp_path / "parts", dualspeed=config, save_strategy="steps", save_steps=5).train()
    resumed = trainer(tmp_path / "parts", model=tiny.llava(seed=9, dropout=0.1), dualspeed=config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-5"))
    assert losses(resumed) == losses(whole)


def test_more_slow_steps_than_steps_are_refused_before_the_first_one(tmp_path):
    made = trainer(tmp_path, dualspeed=DualSpeedConfig(slow_steps=NUM_STEPS + 1))
    with pytest.raises(ConfigError, match=f"slow_steps: {NUM_STEPS + 1} of {NUM_STEPS} steps"):
        made.train()
    assert made.state.global_step == 0


def test_resumed_equals_uninterrupted(tmp_path):
    """Losses, modes and final weights, with dropout, a random pruner and AdamW's moments."""
    whole = trainer(tmp_path / "whole")
    whole.train()
    first = trainer(tmp_path / "parts", save_strategy="steps", save_steps=3)
    first.train()
    second = trainer(tmp_path / "parts", model=tiny.llava(seed=9, dropout=0.1))
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    assert losses(second) == losses(whole)
    assert {mode for entry in losses(whole) for mode in ("fast", "slow") if f"{mode}/ce_loss" in entry} == {
        "fast",
        "slow",
    }
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name


def test_evaluating_while_training_changes_no_weight_and_takes_no_training_time(tmp_path, monkeypatch):
    """With dropout, whose random numbers must not depend on the evaluations."""
    plain = trainer(tmp_path)
    plain.train()
    # A clock that advances by a second at each reading, and by 1,000 in each evaluation.
    seconds, stock = [0.0], Trainer.evaluate

    def pass_time(duration: float) -> float:
        seconds[0] += duration
        return seconds[0]

    def slow_evaluation(*args, **kwargs):
        pass_time(1000.0)
        return stock(*args, **kwargs)

    for module in ("mixin", "totals"):
        clock = SimpleNamespace(perf_counter=lambda: pass_time(1.0))
        monkeypatch.setattr(f"dualspeed.training.{module}.time", clock)
    monkeypatch.setattr(Trainer, "evaluate", slow_evaluation)
    evaluated = trainer(tmp_path, eval_strategy="steps", eval_steps=2)
    evaluated.train()
    history = evaluated.state.log_history
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [2, 4, 6, 8]
    assert losses(evaluated) == losses(plain)
    for name, value in plain.model.state_dict().items():
        assert torch.equal(evaluated.model.state_dict()[name], value), name
    assert evaluated.evaluation_seconds > 4000
    assert all(4 / entry["samples_per_second"] < 100 for entry in history if "loss" in entry)


def test_resuming_refuses_a_checkpoint_without_its_isolator(tmp_path):
    trained = trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trained.train()
    (tmp_path / "checkpoint-1" / "mode_isolator.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no mode isolator"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("name", ["traj_adamw_lr1e-4"])
def test_published_trajectory(tmp_path, monkeypatch, name):
    """The trainer has the losses of the six published steps, in which slow steps leave the isolator unchanged."""
    steps = CASES["trajectories"][name]
    model = golden_model()
    trained = DualSpeedTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=len(steps),
            per_device_train_batch_size=1,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"index": 0}]),
        data_collator=lambda rows: batch("main"),
    )
    monkeypatch.setattr(trained, "mode_of_step", lambda step: Mode(steps[step][0]))
    trained.train()
    for logged, (_, loss, _, divergence) in zip(losses(trained), steps, strict=True):
        assert logged["loss"] == pytest.approx(loss, rel=1e-5)
        if divergence is not None:
            assert logged["slow/distillation_loss"] == pytest.approx(divergence, rel=1e-5)


def test_accumulation_gives_the_gradients_of_one_batch(tmp_path):
    """Micro-batches with different numbers of supervised tokens are weighted by token, and share a mode."""
    settings = DualSpeedConfig(slow_mode_ratio=0.5, mode_schedule="stratified")
    results = []
    for batch_size in (4, 1):
        trained = trainer(
            tmp_path,
            model=tiny.llava(),
            dualspeed=settings,
            optim="sgd",
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=4 // batch_size,
        )
        trained.train()
        results.append((losses(trained), trained.model.state_dict()))
    (whole_losses, whole), (parts_losses, parts) = results
    for one, other in zip(whole_losses, parts_losses, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    assert_close(parts, whole, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("slow_batch_size", [None, 1, 3])
@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_slow_steps_in_parts_give_the_gradients_of_whole_ones(tmp_path, slow_batch_size, activation_checkpointing):
    """Micro-batches with different numbers of images and supervised tokens; fast steps between them."""
    settings = DualSpeedConfig(slow_mode_ratio=0.5, mode_schedule="stratified", pruner="random")
    arguments = {"dualspeed": settings, "optim": "sgd", "max_steps": 4}
    whole = trainer(tmp_path, model=tiny.llava(), **arguments)
    whole.train()
    parts = trainer(tmp_path, tiny.llava(), activation_checkpointing=activation_checkpointing, **arguments)
    parts.slow_batch_size = slow_batch_size
    parts.data_collator = lambda rows: collate_rows(rows) | {"num_images": [row["num_images"] for row in rows]}
    parts.train()
    for entry, expected in zip(losses(parts), losses(whole), strict=True):
        assert entry == pytest.approx(expected, rel=1e-5)
    assert_close(parts.model.state_dict(), whole.model.state_dict(), atol=1e-6, rtol=1e-5)


def test_slow_steps_in_parts_need_num_images(tmp_path):
    settings = DualSpeedConfig(slow_mode_ratio=1.0)
    parts = trainer(tmp_path, dualspeed=settings, slow_batch_size=2)
    with pytest.raises(ValueError, match="needs `num_images`"):
        parts.train()


def test_evaluation_is_cross_entropy_on_all_tokens(tmp_path):
    evaluated = trainer(tmp_path, per_device_eval_batch_size=6)
    expected = tiny.llava().eval()(**collate_rows(list(dataset(6)))).loss.item()
    assert evaluated.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_isolator_learns_with_the_projector_and_never_decays(tmp_path):
    prepared = trainer(tmp_path, projector_learning_rate=5e-4, weight_decay=0.1)
    optimizer = prepared.create_optimizer()
    isolator = prepared.model.mode_isolator.weight
    group = next(group for group in optimizer.param_groups if any(p is isolator for p in group["params"]))
    assert (group["lr"], group["weight_decay"]) == (5e-4, 0.0)
    by_name = {group["name"]: group for group in optimizer.param_groups}
    assert (by_name["projector"]["lr"], by_name["projector"]["weight_decay"]) == (5e-4, 0.1)
    assert (by_name["model"]["lr"], by_name["model"]["weight_decay"]) == (1e-3, 0.1)
    trainable = {id(p) for p in prepared.model.parameters() if p.requires_grad}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == trainable


@pytest.mark.parametrize("part", ["projector", "vision"])
def test_a_learning_rate_of_zero_holds_its_part(tmp_path, part):
    model = DualSpeedModel(tiny.llava(), DualSpeedConfig(slow_mode_ratio=0.4, pruning_ratio=0.7))
    set_trainable(model, "finetune", with_vision=True)
    parts, before = parts_of(model), {name: values.clone() for name, values in model.named_parameters()}
    held = trainer(tmp_path, model, model.dualspeed, weight_decay=0.1, max_steps=3, **{f"{part}_learning_rate": 0.0})
    held.train()
    changed = {parts[name] for name, values in model.named_parameters() if not torch.equal(values, before[name])}
    assert changed == {"language", "projector", "vision"} - {part}


def test_saved_model_is_stock_and_resumable(tmp_path):
    base = tiny.make_llava(tmp_path / "base")
    trained = trainer(tmp_path, model=AutoModelForImageTextToText.from_pretrained(base), max_steps=2)
    trained.train()
    trained.save_model(str(tmp_path / "out"))
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert_close(stock.state_dict(), trained.model.vlm.state_dict(), atol=0, rtol=0)
    assert json.loads((tmp_path / "out" / "dualspeed.json").read_text())["pruner"] == "random"


def test_batches_without_supervision_are_counted(tmp_path):
    def without_labels(rows: list[dict]) -> dict[str, torch.Tensor]:
        collated = collate_rows(rows)
        collated["labels"].fill_(-100)
        return collated

    trained = trainer(tmp_path, max_steps=2, logging_steps=2)
    trained.data_collator = without_labels
    before = {name: p.clone() for name, p in trained.model.named_parameters()}
    trained.train()
    assert trained.state.log_history[0]["batches_without_supervision"] == 2
    assert trained.state.log_history[0]["loss"] == 0
    for name, parameter in trained.model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_activation_checkpointing_changes_no_result(tmp_path):
    trained = []
    for is_on in (False, True):
        # One after the other: the trainer seeds the random numbers of dropout when it is made.
        trained.append(trainer(tmp_path, max_steps=4, activation_checkpointing=is_on))
        trained[-1].train()
    plain, checkpointed = trained
    assert checkpointed.model.is_activation_checkpointing
    assert not plain.model.is_activation_checkpointing
    for entry, expected in zip(losses(checkpointed), losses(plain), strict=True):
        assert entry == pytest.approx(expected, rel=1e-5)
    assert_close(checkpointed.model.state_dict(), plain.model.state_dict(), atol=1e-6, rtol=1e-5)
    checkpointed.model.activation_checkpointing_disable()
    assert not checkpointed.model.is_activation_checkpointing


def test_only_slow_steps_recompute_activations(tmp_path):
    """Counted: runs of the language model's first layer in a step, including its backward pass."""
    trained = trainer(tmp_path, activation_checkpointing=True, logging_steps=1)
    calls = []
    trained.model.vlm.get_decoder().layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    per_step = []
    training_step = trained.training_step

    def counted(*args, **kwargs):
        calls.clear()
        loss = training_step(*args, **kwargs)
        per_step.append((trained.mode_of_step(trained.state.global_step), len(calls)))
        return loss

    trained.training_step = counted
    trained.train()
    # A slow step is the teacher's forward pass, the student's, and its recomputation.
    assert set(per_step) == {(Mode.FAST, 1), (Mode.SLOW, 3)}
