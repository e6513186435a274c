"""Batches by tokens: micro-batches of like pruned length, with the gradients of plain batches."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import TrainerCallback, TrainingArguments

from dualspeed import DualSpeedConfig, DualSpeedTrainer, Mode
from dualspeed.data.collator import ConversationCollator
from dualspeed.errors import ConfigError, InterruptedTrainingError, SampleError
from dualspeed.settings.recipe import Recipe
from dualspeed.settings.stage import StageSettings
from dualspeed.training.stage import train, training_arguments
from dualspeed.training.token_batches import TokenBudgets, check_samples, padded_groups, read_rows, split_to
from measurements.padding import figures
from tests.support import tiny
from tests.support.batches import IMAGE_TOKEN, PAD_TOKEN, collate, sample
from tests.support.stage import assert_same_weights, stage_settings, train_stage

NUM_STEPS = 6
BOTH_MODES = DualSpeedConfig(slow_mode_ratio=0.5, mode_schedule="stratified", pruning_ratio=0.7, pruner="random")
BUDGETS = {"tokens_per_batch": 100, "slow_tokens_per_batch": 150}


class Recorder(TrainerCallback):
    """Records each step's gradients, and the (rows, length) and tokens of each of its micro-batches."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.shapes: list[list[tuple[int, int]]] = []
        self.rows: list[list[list[list[int]]]] = []

    def attach(self, trainer: DualSpeedTrainer) -> "Recorder":
        trainer.add_callback(self)
        trainer.model.vlm.register_forward_pre_hook(self._note, with_kwargs=True)
        return self

    def _note(self, module, args, kwargs) -> None:
        if torch.is_grad_enabled():  # the student, not the teacher
            self.shapes[-1].append(tuple(kwargs["input_ids"].shape))
            ids = kwargs["input_ids"].tolist()
            self.rows[-1].append([[token for token in row if token not in (0, PAD_TOKEN)] for row in ids])

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.shapes.append([])
        self.rows.append([])

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.gradients.append(
            {name: values.grad.clone() for name, values in model.named_parameters() if values.grad is not None}
        )


def dataset(num_samples: int = 48) -> Dataset:
    """Samples with none, one or two images, of different lengths."""
    return Dataset.from_list([{"seed": seed, "num_images": seed % 3} for seed in range(num_samples)])


def collator(family: str, side: str = "right"):
    def collate_rows(rows: list[dict]) -> dict:
        made = collate([sample(family, row["seed"], row["num_images"]) for row in rows], side)
        return made | {"num_images": [row["num_images"] for row in rows]}

    return collate_rows


def make_trainer(folder, family="llava", side="right", dualspeed=BOTH_MODES, **arguments) -> DualSpeedTrainer:
    ours = ("tokens_per_batch", "slow_tokens_per_batch", "slow_batch_size", "data_collator", "train_dataset")
    own = {name: arguments.pop(name) for name in ours if name in arguments}
    defaults = {
        "output_dir": str(folder),
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return DualSpeedTrainer(
        model={"llava": tiny.llava, "llava_next": tiny.llava_next}[family](),
        args=TrainingArguments(**defaults | arguments),
        dualspeed=dualspeed,
        **{"data_collator": collator(family, side), "train_dataset": dataset()} | own,
    )


def trained(folder, **arguments) -> tuple[DualSpeedTrainer, Recorder]:
    made = make_trainer(folder, **arguments)
    recorder = Recorder().attach(made)
    made.train()
    return made, recorder


def partitions(places: list[int]):
    """All ways to divide places into groups."""
    if not places:
        yield []
        return
    first, *rest = places
    for size in range(len(rest) + 1):
        for mates in itertools.combinations(rest, size):
            for others in partitions([place for place in rest if place not in mates]):
                yield [[first, *mates], *others]


def cost(groups: list[list[int]], lengths: list[int]) -> tuple[int, int]:
    """Number of groups, and their tokens with padding."""
    return len(groups), sum(len(group) * max(lengths[place] for place in group) for group in groups)


@pytest.mark.parametrize("seed", range(12))
def test_groups_are_the_fewest_with_the_least_padding(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 30, (6,), generator=generator).tolist()
    budget = max(lengths) + seed * 5
    found = padded_groups(lengths, budget)
    assert sorted(itertools.chain(*found)) == list(range(6))
    within = [
        groups
        for groups in partitions(list(range(6)))
        if all(len(group) * max(lengths[place] for place in group) <= budget for group in groups)
    ]
    assert found in [[sorted(group, key=lambda place: -lengths[place]) for group in found]]
    assert cost(found, lengths) == min(cost(groups, lengths) for groups in within)


def test_groups_are_split_to_a_number():
    assert sorted(map(sorted, split_to([[0, 1, 2, 3], [4]], 4))) == [[0], [1], [2, 3], [4]]
    assert split_to([[0, 1], [2]], 2) == [[0, 1], [2]]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_rows_have_the_lengths_that_pruning_gives(family, side):
    """Each row alone has exactly the counted length in fast mode, and in slow mode."""
    made = make_trainer("unused", family=family)
    method, recorder = made.model.dualspeed, Recorder().attach(made)
    rows = [{"seed": seed, "num_images": seed % 3} for seed in range(6)]
    batch = collator(family, side)(rows)
    found = read_rows(batch, batch.pop("num_images"), IMAGE_TOKEN, method)
    for place, row in enumerate(rows):
        recorder.on_step_begin(None, None, None)
        alone = collator(family)([row])
        del alone["num_images"]
        for mode, length in ((Mode.FAST, found.pruned[place]), (Mode.SLOW, found.full[place])):
            made.model(**alone, mode=mode)
            assert recorder.shapes[-1][-1] == (1, length)
        start, end = found.extents[place]
        assert batch["attention_mask"][place, start:end].all()
        assert batch["attention_mask"][place].sum() == end - start


@pytest.mark.parametrize(
    ("family", "side", "arguments"),
    [
        ("llava", "right", {}),
        ("llava", "left", {"activation_checkpointing": True}),
        ("llava_next", "right", {}),
        ("llava", "right", {"accelerator_config": {"split_batches": True}, "dataloader_num_workers": 1}),
    ],
    ids=["llava", "left", "llava_next", "workers"],
)
def test_gradients_are_those_of_plain_batches(tmp_path, family, side, arguments):
    whole, plain = trained(tmp_path, family=family, side=side, **arguments)
    budgets = BUDGETS if family == "llava" else {"tokens_per_batch": 160, "slow_tokens_per_batch": 300}
    parts, divided = trained(tmp_path, family=family, side=side, **budgets, **arguments)
    modes = [parts.mode_of_step(step) for step in range(NUM_STEPS)]
    assert set(modes) == {Mode.FAST, Mode.SLOW}
    for step, mode in enumerate(modes):
        assert len(plain.shapes[step]) == 1 < len(divided.shapes[step])
        assert len({length for _, length in divided.shapes[step]}) > 1
        assert sum(rows for rows, _ in divided.shapes[step]) == plain.shapes[step][0][0] == 8
        budget = budgets["tokens_per_batch" if mode is Mode.FAST else "slow_tokens_per_batch"]
        assert all(rows * length <= budget for rows, length in divided.shapes[step])
        assert divided.gradients[step].keys() == plain.gradients[step].keys()
        assert_close(divided.gradients[step], plain.gradients[step], atol=1e-5, rtol=1e-5)
    assert_close(parts.model.state_dict(), whole.model.state_dict(), atol=1e-6, rtol=1e-5)
    kept = ("loss", "fast/ce_loss", "slow/ce_loss", "slow/distillation_loss", "grad_norm")
    for one, other in zip(parts.state.log_history[:-1], whole.state.log_history[:-1], strict=True):
        found, expected = ({name: entry[name] for name in kept if name in entry} for entry in (one, other))
        assert found == pytest.approx(expected, rel=1e-4)


def test_a_resumed_training_has_the_same_micro_batches(tmp_path):
    """And the same weights, bit for bit, after steps of both modes."""
    arguments = {"save_strategy": "steps", "save_steps": 3, **BUDGETS}
    whole, expected = trained(tmp_path / "whole", **arguments)
    resumed = make_trainer(tmp_path / "resumed", **arguments)
    recorder = Recorder().attach(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert len(recorder.rows) == NUM_STEPS - 3
    assert recorder.rows == expected.rows[3:]
    assert_close(resumed.model.state_dict(), whole.model.state_dict(), atol=0, rtol=0)


def test_the_samples_of_a_step_are_those_of_a_plain_training(tmp_path):
    """Their order within the step alone differs."""
    _, plain = trained(tmp_path, dualspeed=DualSpeedConfig(slow_mode_ratio=1.0))
    _, divided = trained(tmp_path, dualspeed=DualSpeedConfig(slow_mode_ratio=1.0), **BUDGETS)
    for (whole,), parts in zip(plain.rows, divided.rows, strict=True):
        assert len(parts) > 1
        assert len(whole) == 8
        assert sorted(itertools.chain(*parts)) == sorted(whole)


def test_padding_is_counted():
    assert figures(np.array([[2, 4], [3, 3]]), [[[0, 1]], [[0], [1]]]) == {
        "padding": "14.3%",  # 2 of 14
        "micro-batches of a step": "1.50",
        "largest, tokens": 8,
    }


def test_a_longer_sample_is_named(tmp_path):
    made = make_trainer(tmp_path, tokens_per_batch=60, slow_tokens_per_batch=40)
    with pytest.raises(SampleError, match=r"sample \d of the batch has \d+ tokens in a slow step, slow_tokens_per_bat"):
        made.train()
    made = make_trainer(tmp_path, tokens_per_batch=20, slow_tokens_per_batch=200)
    with pytest.raises(SampleError, match=r"tokens in a fast step, tokens_per_batch is 20"):
        made.train()


def test_num_images_are_needed(tmp_path):
    made = make_trainer(tmp_path, **BUDGETS, data_collator=lambda rows: collate([sample("llava", 1, 1)] * len(rows)))
    with pytest.raises(SampleError, match="tokens_per_batch needs `num_images`"):
        made.train()


REFUSED = {
    "slow alone": ({"slow_tokens_per_batch": 9}, "slow_tokens_per_batch: has no effect without tokens_per_batch"),
    "zero": ({"tokens_per_batch": 0}, "tokens_per_batch: 0 is out of range"),
    "slow_batch_size": ({**BUDGETS, "slow_batch_size": 1}, "slow_batch_size: has no effect beside tokens_per_batch"),
    "accumulation": ({**BUDGETS, "gradient_accumulation_steps": 2}, "gradient_accumulation_steps: 2, but tokens_per"),
    "auto batch": ({**BUDGETS, "auto_find_batch_size": True}, "auto_find_batch_size: lowers the samples"),
    "rebalance": ({**BUDGETS, "train_sampling_strategy": "batch_rebalance"}, "'batch_rebalance' makes micro-batches"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_contradictions_are_refused(tmp_path, name):
    arguments, reason = REFUSED[name]
    with pytest.raises(ConfigError, match=reason):
        make_trainer(tmp_path, **arguments)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"max_length": 300}, "doesn't give the num_images"),
        ({"with_num_images": True}, "slow_tokens_per_batch: 90, but rows may be of any length"),
        ({"with_num_images": True, "max_length": 91}, "slow_tokens_per_batch: 90, but rows may be of up to 91 tokens"),
    ],
)
def test_rows_that_may_not_fit_are_refused(tmp_path, given, reason):
    collate_rows = ConversationCollator(tiny.llava_processor(), **given)
    with pytest.raises(ConfigError, match=reason):
        make_trainer(tmp_path, tokens_per_batch=100, slow_tokens_per_batch=90, data_collator=collate_rows)


def stage(**recipe) -> StageSettings:
    """Settings of a stage of samples of 30 tokens or so; `recipe` are its further settings."""
    chosen = stage_settings()
    return dataclasses.replace(chosen, recipe=dataclasses.replace(chosen.recipe, **recipe))


def test_a_stage_trains_to_the_same_weights_however_often_it_is_killed(stage_inputs, tmp_path):
    chosen = stage(tokens_per_batch=60, slow_tokens_per_batch=70)
    whole = train_stage(stage_inputs, tmp_path / "whole", chosen)
    for _ in range(2):
        with pytest.raises(InterruptedTrainingError):
            train(
                chosen, stage_inputs / "base", stage_inputs / "data", tmp_path / "s", tmp_path / "cut", time_limit=1e-6
            )
    train(chosen, stage_inputs / "base", stage_inputs / "data", tmp_path / "s", tmp_path / "cut")
    assert_same_weights(tmp_path / "cut", whole)
    plain = train_stage(stage_inputs, tmp_path / "plain", stage())
    found, expected = (load_file(folder / "model.safetensors") for folder in (whole, plain))
    assert any(not torch.equal(found[name], expected[name]) for name in found)  # the sums have another order
    assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_stage_names_the_sample_that_is_too_long(stage_inputs, tmp_path):
    data = Dataset.from_list(
        [{"id": name, "num_tokens": 30 + 20 * (name == "long"), "num_image_tokens": 20} for name in ("one", "long")]
    )
    with pytest.raises(ConfigError, match="slow_tokens_per_batch: 49, but sample 'long' has 50 tokens in a slow step"):
        check_samples(data, TokenBudgets(60, 49), DualSpeedConfig())
    with pytest.raises(ConfigError, match="tokens_per_batch: 35, but sample 'long' has 36 tokens in a fast step"):
        check_samples(data, TokenBudgets(35, 50), DualSpeedConfig())  # 30 of text, 2 kept tokens, 4 of the isolator
    check_samples(data, TokenBudgets(36, 50), DualSpeedConfig())
    check_samples(data, TokenBudgets(36, 1), DualSpeedConfig(slow_mode_ratio=0.0))
    with pytest.raises(ConfigError, match="sample '0' has 30 tokens in a slow step"):
        train_stage(stage_inputs, tmp_path, stage(tokens_per_batch=60, slow_tokens_per_batch=29))


def test_validation_takes_as_many_samples_as_the_budget_holds(tmp_path):
    held_out = Dataset.from_list([{"num_tokens": length} for length in (20, 31, 25)])
    chosen = stage(tokens_per_batch=50, slow_tokens_per_batch=100, validation_annotations="v.json", validation_steps=2)
    arguments = training_arguments(chosen, tmp_path, "num_tokens", held_out)
    assert (arguments.per_device_eval_batch_size, arguments.per_device_train_batch_size) == (3, 4)
    assert arguments.gradient_accumulation_steps == 1


RECIPES = {
    "slow alone": ({"slow_tokens_per_batch": 9}, "slow_tokens_per_batch: has no effect"),
    "samples": ({"tokens_per_batch": 99, "per_device_batch_size": 2}, "per_device_batch_size: 2, but tokens_per_batch"),
    "slow": ({"tokens_per_batch": 99, "slow_per_device_batch_size": 2}, "slow_per_device_batch_size: 2, but tokens_"),
    "none": ({"tokens_per_batch": 0}, "tokens_per_batch: 0 is out of range"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_refuses_contradictions(name):
    settings, reason = RECIPES[name]
    with pytest.raises(ConfigError, match=reason):
        Recipe(annotations="a.json", images="images", global_batch_size=4, **settings)
