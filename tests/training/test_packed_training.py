"""Trainings with packed rows: the gradients of plain ones, without padding, in budgets of tokens or without."""

import dataclasses

import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close
from transformers import TrainerCallback, TrainingArguments

from dualspeed import DualSpeedConfig, DualSpeedTrainer, Mode
from dualspeed.errors import ConfigError
from dualspeed.settings.finetune import FinetuneRun
from dualspeed.settings.recipe import Recipe
from dualspeed.training.token_batches import packed_groups
from tests.support import tiny
from tests.support.batches import collate, sample
from tests.support.stage import stage_settings, train_stage
from tests.support.varlen import STAND_IN, attention_by_lengths, by_lengths, use

NUM_STEPS = 4
BUDGETS = {"tokens_per_batch": 100, "slow_tokens_per_batch": 150}


@pytest.fixture(autouse=True)
def stand_in():
    with attention_by_lengths():
        yield


class Recorder(TrainerCallback):
    """Records each step's gradients, and the shape of each micro-batch in the language model."""

    def __init__(self, trainer: DualSpeedTrainer) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.shapes: list[list[tuple[int, int]]] = []
        trainer.add_callback(self)
        trainer.model.vlm.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module, args, kwargs) -> None:
        if torch.is_grad_enabled():
            self.shapes[-1].append(tuple(kwargs["input_ids"].shape))

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.shapes.append([])

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.gradients.append(
            {name: values.grad.clone() for name, values in model.named_parameters() if values.grad is not None}
        )


def collate_rows(rows: list[dict]) -> dict:
    made = collate([sample("llava", row["seed"], row["num_images"]) for row in rows])
    return made | {"num_images": [row["num_images"] for row in rows]}


def make_trainer(folder, attention: str, arguments: dict | None = None, **own) -> DualSpeedTrainer:
    vlm = tiny.llava()
    use(vlm, attention)
    defaults = {"output_dir": str(folder), "max_steps": NUM_STEPS, "per_device_train_batch_size": 8, "optim": "sgd"}
    defaults |= {"learning_rate": 1e-2, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "report_to": []}
    rows = Dataset.from_list([{"seed": seed, "num_images": seed % 3} for seed in range(32)])
    return DualSpeedTrainer(
        model=vlm,
        args=TrainingArguments(**defaults | (arguments or {})),
        dualspeed=DualSpeedConfig(slow_mode_ratio=0.5, mode_schedule="stratified", pruning_ratio=0.7),
        train_dataset=rows,
        eval_dataset=rows.select(range(6)),
        data_collator=collate_rows,
        **own,
    )


@pytest.mark.parametrize(("own", "arguments"), [({}, {}), (BUDGETS, {}), (BUDGETS, {"activation_checkpointing": True})])
def test_gradients_are_those_of_plain_steps(tmp_path, own, arguments):
    """Evaluation isn't packed."""
    plain = make_trainer(tmp_path, "sdpa")
    expected = Recorder(plain)
    plain.train()
    packing = make_trainer(tmp_path, STAND_IN, arguments, packing=True, **own)
    found = Recorder(packing)
    packing.train()
    modes = [packing.mode_of_step(step) for step in range(NUM_STEPS)]
    assert set(modes) == {Mode.FAST, Mode.SLOW}
    assert by_lengths.calls > 0
    for step, mode in enumerate(modes):
        assert {rows for rows, _ in found.shapes[step]} == {1}
        assert len(found.shapes[step]) > 1 if own else len(found.shapes[step]) == 1
        ((rows, length),) = expected.shapes[step]
        assert sum(tokens for _, tokens in found.shapes[step]) < rows * length
        if own:
            budget = own["tokens_per_batch" if mode is Mode.FAST else "slow_tokens_per_batch"]
            assert all(tokens <= budget for _, tokens in found.shapes[step])
        assert found.gradients[step].keys() == expected.gradients[step].keys()
        assert_close(found.gradients[step], expected.gradients[step], atol=1e-5, rtol=1e-5)
    use(packing.model.vlm, "sdpa")
    assert packing.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)


def test_packed_groups_fill_the_room_that_others_left():
    assert packed_groups([5, 3, 8, 2, 1], 10) == [[2, 3], [0, 1, 4]]
    assert packed_groups([4, 4, 4], 4) == [[0], [1], [2]]


REFUSED = {
    "sdpa": ("sdpa", {}, "packing: the language model's attention is 'sdpa', which reads no cumulative lengths"),
    "flex": ("flex_attention", {}, "packing: flex_attention has no backward pass on a CPU"),
    "noise": (STAND_IN, {"arguments": {"neftune_noise_alpha": 5.0}}, "neftune_noise_alpha: noise falls with a row's"),
    "loss": (STAND_IN, {"compute_loss_func": lambda *_, **__: 0}, "compute_loss_func"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_packing_cannot_do_is_refused(tmp_path, name):
    attention, given, reason = REFUSED[name]
    with pytest.raises(ConfigError, match=reason) as raised:
        make_trainer(tmp_path, attention, packing=True, **given)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("attention", [None, "sdpa", "eager"])
def test_settings_refuse_packing_without_lengths(attention):
    with pytest.raises(
        ConfigError, match=f"packing: .* is '{attention or 'sdpa'}', .* valid: attn_implementation flash_"
    ):
        Recipe(annotations="a", images="b", global_batch_size=4, packing=True, attn_implementation=attention)
    with pytest.raises(ConfigError, match="packing: "):
        FinetuneRun(model="m", data="d", output_dir="o", packing=True, attn_implementation=attention)
    Recipe(annotations="a", images="b", global_batch_size=4, packing=True, attn_implementation="flash_attention_2")


def test_a_stage_loads_the_language_models_attention(stage_inputs, tmp_path):
    """It would train with these kernels on a GPU; here it is refused before the first step."""
    chosen = stage_settings()
    for attention, reason in (
        ("flex_attention", "no backward pass on a CPU"),
        ("flash_attention_3", "attn_impl.*valid"),
    ):
        recipe = dataclasses.replace(chosen.recipe, packing=True, attn_implementation=attention)
        with pytest.raises(ConfigError, match=reason):
            train_stage(stage_inputs, tmp_path, dataclasses.replace(chosen, recipe=recipe))
