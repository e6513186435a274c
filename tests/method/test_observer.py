"""Observer of pruner calls: sees every call and its result, and leaves the model as it was."""

import pytest
import torch
from torch.testing import assert_close

from dualspeed import DualSpeedConfig, DualSpeedModel, Mode
from dualspeed.method.fast_mode import observe_pruning
from tests.support import tiny
from tests.support.batches import collate, sample


def model_and_batch(**settings) -> tuple[DualSpeedModel, dict[str, torch.Tensor]]:
    model = DualSpeedModel(tiny.llava(), DualSpeedConfig(pruning_ratio=0.5, **settings))
    return model, collate([sample("llava", seed, 1) for seed in range(2)])


def test_observer_sees_each_call_of_the_pruner_and_changes_nothing():
    model, batch = model_and_batch()
    expected = model(mode=Mode.FAST, **batch).loss
    seen = []

    def observer(prune, tokens):
        result = prune()
        seen.append((result, tokens.features.shape))
        return result

    with observe_pruning(model, observer):
        assert_close(model(mode=Mode.FAST, **batch).loss, expected)
        assert [(indices.shape, shape) for indices, shape in seen] == [((2, 8), (2, 16, 48))]
        model(mode=Mode.SLOW, **batch)  # the teacher prunes too
        model(mode=Mode.SLOW, distill=False, **batch)
        assert len(seen) == 2
        model.generate(mode=Mode.FAST, max_new_tokens=1, do_sample=False, **without_labels(batch))
        assert len(seen) == 3
    model(mode=Mode.FAST, **batch)
    assert len(seen) == 3 and model.pruning_observer is None


def without_labels(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: values for name, values in batch.items() if name != "labels"}


def test_observers_nest_and_end_with_an_error():
    model, batch = model_and_batch()

    def failing(prune, tokens):
        raise RuntimeError("observer")

    def outer(prune, tokens):
        return prune()

    with observe_pruning(model, outer):
        with pytest.raises(RuntimeError, match="observer"), observe_pruning(model, failing):
            model(mode=Mode.FAST, **batch)
        assert model.pruning_observer is outer
