"""Kept outputs of a tower's layers: the model reads them as it would make them, and the host waits no more for it."""

import pytest
import torch
from accelerate.utils import send_to_device
from torch.utils.data._utils.pin_memory import pin_memory

from dualspeed import DualSpeedConfig, DualSpeedModel, Mode
from dualspeed.errors import ModelError
from dualspeed.method.vlm.encoder import accepted_inputs
from dualspeed.method.vlm.parts import vision_layers
from dualspeed.method.vlm.tower_states import TowerStates, attention_fields, states_of_images
from dualspeed.training.micro_batches import micro_batches
from tests.support import tiny
from tests.support.families import FAMILIES
from tests.support.prepared import collated
from tests.support.stand_in import NAME, host_syncs

COVERED = [family for family in FAMILIES if family.name not in ("LLaVA-OneVision", "Mistral 3")]
QUICK = ("LLaVA-1.5", "LLaVA-NeXT", "Qwen2.5-VL", "Qwen3-VL")
by_family = pytest.mark.parametrize(
    "family",
    [pytest.param(family, marks=() if family.name in QUICK else pytest.mark.slow) for family in COVERED],
    ids=[family.name for family in COVERED],
)
PRUNER = "visionzip"  # reads attention and keys


def kept(family, model: DualSpeedModel, batch: dict) -> TowerStates:
    """Outputs for a batch as one block, which is enough where the batch isn't divided."""
    images = {name: batch[name] for name in accepted_inputs(model.vlm) if name in batch}
    return TowerStates.joined([states_of_images(model.vlm, images, attention_fields(model.vlm, model.pruner.needs))])


@by_family
def test_reading_gives_the_losses_and_gradients_of_running_without_more_waits(family):
    model = DualSpeedModel(family.build(), DualSpeedConfig(pruner=PRUNER, pruning_ratio=0.6))
    batch = collated(family, model, (2, 0, 1))
    del batch["num_images"]
    states, found = kept(family, model, batch), {}
    calls: list[int] = []
    mlp = next(module for name, module in vision_layers(model.vlm)[0].named_modules() if "mlp" in name)
    mlp.register_forward_hook(lambda *args: calls.append(1))
    for mode in Mode:
        for given in (None, states):
            calls.clear()
            loss = model(**batch, tower_states=given, mode=mode).loss
            model.zero_grad()
            loss.backward()
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            trained = {name: grad for name, grad in gradients.items() if not in_layers(name)}
            found[mode, given is None] = loss, trained
            assert bool(calls) == (given is None)
        assert torch.equal(found[mode, True][0], found[mode, False][0])
        assert found[mode, True][1].keys() >= found[mode, False][1].keys()
        for name, grad in found[mode, False][1].items():
            assert torch.equal(grad, found[mode, True][1][name]), name
    model.to(NAME)
    sent = send_to_device(dict(batch), NAME)
    for mode in Mode:
        waits = []
        for given in (None, states):
            with host_syncs() as syncs:
                model(**sent, tower_states=given, mode=mode).loss.backward()
            waits.append(len(syncs.ours()))
            assert not [str(upload) for upload in syncs.uploads if upload.is_ours]
        assert waits[1] <= waits[0]
    assert all(not vars(layer).get("forward") for layer in vision_layers(model.vlm))


def in_layers(name: str) -> bool:
    """True for parameters of the tower before its projector, of which a frozen one has no gradients."""
    return any(part in name for part in ("vision_tower", "vision_model", ".visual.")) and "merger" not in name


def states_of(*rows: int) -> TowerStates:
    values = iter(range(99))
    return TowerStates.joined([{"layer_1": torch.tensor([[float(next(values))] for _ in range(n)])} for n in rows])


def test_states_are_a_sequence_of_images():
    whole = states_of(2, 1, 3)
    assert len(whole) == 3 and whole.rows == [2, 1, 3]
    part = whole[1:3]
    assert (part.rows, part.fields["layer_1"].flatten().tolist()) == ([1, 3], [2, 3, 4, 5])
    back = whole[0:1] + part
    assert back.rows == whole.rows and torch.equal(back.fields["layer_1"], whole.fields["layer_1"])
    assert len(whole[0:0]) == len(states_of()) == 0
    assert whole.to(torch.device("meta")).fields["layer_1"].is_meta


def test_loaders_keep_states_as_they_are():
    """Pinning memory and moving batches leave them whole; accelerate moves them."""
    states = states_of(1, 2)
    moved = send_to_device({"tower_states": states}, "meta")["tower_states"]
    assert moved.rows == [1, 2] and moved.fields["layer_1"].is_meta
    if torch.cuda.is_available():
        assert pin_memory({"tower_states": states})["tower_states"].fields["layer_1"].is_pinned()


def test_micro_batches_have_the_states_of_their_images():
    batch = {"input_ids": torch.zeros(4, 3), "pixel_values": torch.zeros(3, 1), "tower_states": states_of(1, 2, 1)}
    parts = micro_batches(batch, [1, 0, 2, 0], 1)
    assert [part["tower_states"].rows for part in parts] == [[1], [], [2, 1], []]
    assert [("pixel_values" in part) for part in parts] == [True, False, True, False]


def test_without_images_beside_other_ranks_no_layer_runs(monkeypatch):
    """As on the ranks with images, so that all make the same calls."""
    monkeypatch.setattr("dualspeed.method.model.has_other_ranks", lambda: True)
    model = DualSpeedModel(tiny.llava(), DualSpeedConfig())
    calls: list[int] = []
    vision_layers(model.vlm)[0].mlp.register_forward_hook(lambda *args: calls.append(1))
    text = torch.tensor([[1, 5, 6, 7]])
    losses = [model(text, labels=text, tower_states=given).loss for given in (None, states_of())]
    assert torch.equal(*losses) and calls == [1]


def test_states_of_another_batch_are_refused():
    model = DualSpeedModel(tiny.llava(), DualSpeedConfig())
    images = torch.randn(2, 3, 28, 28)
    states = TowerStates.joined([states_of_images(model.vlm, {"pixel_values": images[:1]}, [])])
    text = torch.tensor([[1] + [4] * 32 + [5]])
    with pytest.raises(
        ModelError, match=r"kept outputs of a batch are \(1, 17, 32\), and its images become \(2, 17, 32\)"
    ):
        model(text, labels=text.masked_fill(text == 4, -100), pixel_values=images, tower_states=states)
