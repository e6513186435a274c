"""Validation during training: its counts, and that training is the same with it, interrupted or not."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk
from torch.nn import functional as F
from transformers import EvalPrediction

from dualspeed import DualSpeedConfig, DualSpeedModel
from dualspeed.errors import ConfigError, InterruptedTrainingError
from dualspeed.settings.identity import identity, record
from dualspeed.settings.reading import read_dataclass
from dualspeed.settings.recipe import Recipe
from dualspeed.settings.stage import StageSettings
from dualspeed.training.stage import train
from dualspeed.training.validation import count_answers, mean_of_answers
from tests.support import tiny
from tests.support.batches import collate, sample
from tests.support.stage import NUM_STEPS, assert_same_weights, interruptible_settings


def test_counts_are_those_of_a_loop_over_answers():
    """Random logits of few tokens, so that some answers are right; several answers of any length in a sample."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (6, 20), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.5] = -100
    labels[2] = -100
    logits = torch.randn(6, 20, 3, generator=generator)
    expected = torch.zeros(6, 4)
    for row in range(6):
        answer: list[bool] = []
        for place in range(1, 21):
            if place < 20 and labels[row, place] != -100:
                scores = logits[row, place - 1]
                answer.append(bool(scores.argmax() == labels[row, place]))
                expected[row, 2:] += torch.stack([torch.tensor(1.0), F.cross_entropy(scores, labels[row, place])])
            elif answer:
                expected[row, :2] += torch.tensor([1.0, all(answer)])
                answer = []
    at_labels = logits[:, :-1][labels[:, 1:] != -100]
    counted = count_answers(at_labels, labels)
    torch.testing.assert_close(counted, expected)
    assert 0 < counted[:, 1].sum() < counted[:, 0].sum()
    means = mean_of_answers(EvalPrediction(predictions=counted.numpy(), label_ids=None))
    assert means["answer_accuracy"] == pytest.approx(100 * (expected[:, 1].sum() / expected[:, 0].sum()).item())
    assert mean_of_answers(EvalPrediction(np.zeros((1, 4)), None)) == {"answer_accuracy": 0, "ce_loss": 0}


@pytest.fixture(scope="module")
def data(stage_inputs, tmp_path_factory):
    """Prepared data of `stage_inputs`, with eight of its samples as held-out ones as well."""
    folder = tmp_path_factory.mktemp("validated") / "data"
    samples = load_from_disk(stage_inputs / "data")
    Dataset.from_list(list(samples)).save_to_disk(folder)
    Dataset.from_list(list(samples.select(range(8)))).save_to_disk(folder / "validation")
    return folder


def validated(every: int = 3, **recipe) -> StageSettings:
    chosen = interruptible_settings()
    recipe |= {"validation_annotations": "held-out.json", "validation_steps": every}
    return dataclasses.replace(chosen, recipe=dataclasses.replace(chosen.recipe, **recipe))


def logged_validations(folder) -> list[tuple[int, dict[str, float]]]:
    """(step, metrics) of each validation in the log, without its duration."""
    lines = [json.loads(line) for path in folder.glob("state/*/metrics.jsonl") for line in path.open()]
    return [
        (line["step"], {key: value for key, value in line["metrics"].items() if key != "validation/seconds"})
        for line in lines
        if "validation/seconds" in line["metrics"]
    ]


def test_training_is_the_same_with_validation_and_interrupted(stage_inputs, uninterrupted, data, tmp_path):
    arguments = (stage_inputs / "base", data, tmp_path / "cut/state", tmp_path / "cut/out")
    chosen = validated(slow_per_device_batch_size=2)
    train(chosen, stage_inputs / "base", data, tmp_path / "whole/state", tmp_path / "whole/out")
    for _ in range(3):
        with pytest.raises(InterruptedTrainingError):
            train(chosen, *arguments, time_limit=1e-6)
    train(chosen, *arguments)
    uninterrupted = logged_validations(tmp_path / "whole")
    assert [step for step, _ in uninterrupted] == [3, 6, 9, 12, NUM_STEPS + 1]
    assert all(entry.keys() >= {"validation/answer_accuracy", "validation/ce_loss"} for _, entry in uninterrupted)
    assert logged_validations(tmp_path / "cut") == uninterrupted
    assert_same_weights(tmp_path / "cut/out", tmp_path / "whole/out")


def test_validation_changes_no_weight(stage_inputs, uninterrupted, data, tmp_path):
    train(validated(every=4), stage_inputs / "base", data, tmp_path / "state", tmp_path / "out")
    assert_same_weights(tmp_path / "out", uninterrupted)


def test_settings_without_validation_are_what_they_were():
    settings = interruptible_settings()
    assert not [key for key in identity(settings)["recipe"] if key.startswith("validation")]
    for one in (settings, validated()):
        for written in (identity(one), record(one)):
            assert read_dataclass(StageSettings, written, "settings.json") == one


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"validation_steps": 5}, "validation_steps: 5 with validation_annotations None; valid: both or neither"),
        ({"validation_annotations": "b.json"}, "validation_steps: None with .*; valid: both or neither"),
        ({"validation_annotations": "b.json", "validation_steps": 0}, "validation_steps: 0 is out of range"),
        ({"validation_annotations": "a.json", "validation_steps": 5}, "'a.json' is trained on; valid: another file"),
        ({"validation_annotations": "./x/../a.json", "validation_steps": 5}, "'./x/../a.json' is trained on; valid:"),
        ({"annotations": "data", "validation_annotations": "data/v", "validation_steps": 5}, "'data/v' is trained on"),
        ({"annotations": "data/a", "validation_annotations": "data", "validation_steps": 5}, "'data' is trained on"),
        ({"training_arguments": {"eval_steps": 5}}, "eval_steps: not set here; valid: validation_steps"),
    ],
)
def test_an_impossible_validation_is_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        Recipe(**{"annotations": "a.json", "images": "images", "global_batch_size": 4} | keys)
    Recipe(
        annotations="data",
        images="images",
        global_batch_size=4,
        validation_annotations="data/v.json",
        validation_steps=5,
    )


def test_full_marks_for_the_models_own_answers():
    """Labels that are the most probable tokens count as right answers; a change of one token makes one wrong."""
    model = DualSpeedModel(tiny.llava().eval(), DualSpeedConfig())
    batch = collate([sample("llava", seed, 1) for seed in range(3)])
    with torch.no_grad():
        logits = model(**batch, distill=False).logits
    labels = batch["labels"].clone()
    labels[:, 1:][labels[:, 1:] != -100] = logits.argmax(dim=-1)
    answers, right, *_ = count_answers(logits, labels).sum(dim=0).tolist()
    assert answers == right > 1
    place = (labels[:, 1:] != -100).nonzero()[0]
    labels[place[0], place[1] + 1] += 1
    assert count_answers(logits, labels)[:, 1].sum() == right - 1
