"""Everything runs on an accelerator as on the CPU: every family and pruner, forward, backward and generation.

On the stand-in of tests/support/stand_in.py, which refuses mixed devices.
"""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

from dualspeed import DualSpeedConfig, DualSpeedModel, Mode
from dualspeed.pruners import PRUNERS
from dualspeed.training.trainable import set_trainable
from tests.support.families import FAMILIES, IMAGE, batch
from tests.support.stand_in import NAME, host_syncs, stand_in

by_family = pytest.mark.parametrize("family", FAMILIES, ids=[family.name for family in FAMILIES])
LLAVAS = pytest.mark.parametrize(
    "family",
    [pytest.param(FAMILIES[0], marks=pytest.mark.slow), FAMILIES[1]],
    ids=["llava", "llava_next"],
)
MIXED = [1, 0, 2]


def moved(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: values.to(NAME) for name, values in inputs.items()}


def step(model: DualSpeedModel, inputs: dict[str, torch.Tensor], mode: Mode) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients, on the CPU, of a step wherever the model is."""
    model.zero_grad()
    with sdpa_kernel(SDPBackend.MATH):  # as the stand-in, so that both round alike and ties are broken alike
        loss = model(mode=mode, **inputs).loss
        loss.backward()
    assert loss.device.type == model.device.type
    gradients = {name: p.grad.clone().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients


def check_step(family, mode: Mode, **settings) -> None:
    """A step on the stand-in has the CPU's loss and gradients."""
    torch.manual_seed(0)
    model = DualSpeedModel(family.build(), DualSpeedConfig(pruning_ratio=0.5, **settings))
    set_trainable(model, "finetune")
    inputs = batch(family, MIXED)
    loss, gradients = step(model, inputs, mode)
    with stand_in():
        there, gradients_there = step(model.to(NAME), moved(inputs), mode)
    assert model.device == torch.device(NAME, 0)
    assert there == pytest.approx(loss, abs=1e-6)
    assert len(gradients) > 10
    assert_close(gradients_there, gradients, atol=1e-5, rtol=1e-4)


@by_family
@pytest.mark.parametrize("mode", Mode)
def test_steps_of_every_family_are_the_cpus(family, mode):
    check_step(family, mode)


@LLAVAS
@pytest.mark.parametrize("pruner", [name for name in PRUNERS if name != "divprune"])
@pytest.mark.parametrize("mode", [Mode.FAST, pytest.param(Mode.SLOW, marks=pytest.mark.slow)])
def test_steps_with_every_pruner_are_the_cpus(family, pruner, mode):
    check_step(family, mode, pruner=pruner)


@pytest.mark.parametrize("pruner", ["divprune", "random", "fastervlm"])
@pytest.mark.parametrize("mode", Mode)
def test_steps_that_prune_tiles_are_the_cpus(pruner, mode):
    check_step(FAMILIES[1], mode, pruner=pruner, prune_budget="tile")


@by_family
@pytest.mark.parametrize("mode", [pytest.param(Mode.FAST, marks=pytest.mark.slow), Mode.SLOW])
def test_a_batch_without_images_beside_other_ranks_is_the_cpus(family, mode, monkeypatch):
    """The blank image goes to the model's device."""
    monkeypatch.setattr("dualspeed.method.model.has_other_ranks", lambda: True)
    model = DualSpeedModel(family.build(), DualSpeedConfig())
    inputs = batch(family, [0, 0])
    loss = model(mode=mode, **inputs).loss.item()
    with stand_in():
        assert model.to(NAME)(mode=mode, **moved(inputs)).loss.item() == pytest.approx(loss, abs=1e-6)


@by_family
def test_generation_is_the_cpus(family):
    torch.manual_seed(0)
    model = DualSpeedModel(family.build(), DualSpeedConfig(pruning_ratio=0.9)).eval()
    model.vlm.generation_config.eos_token_id = None
    model.vlm.generation_config.suppress_tokens = [IMAGE]
    inputs = batch(family, MIXED, padding_side="left")
    del inputs["labels"]
    if family.token_types:
        takes_images = family.token_types == "mm_token_type_ids" or family.name == "Gemma 3"
        inputs[family.token_types] = (inputs["input_ids"] == IMAGE).int() * takes_images
    settings = {"max_new_tokens": 2, "do_sample": False}
    with sdpa_kernel(SDPBackend.MATH):
        here = {mode: model.generate(mode=mode, **settings, **inputs) for mode in Mode}
        with stand_in():
            model.to(NAME)
            there = {mode: model.generate(mode=mode, **settings, **moved(inputs)) for mode in Mode}
    assert all(tokens.device.type == NAME for tokens in there.values())
    assert {mode: tokens.tolist() for mode, tokens in there.items()} == {
        mode: tokens.tolist() for mode, tokens in here.items()
    }


def test_the_stand_in_is_there_only_where_it_is_asked_for():
    assert not torch.accelerator.is_available()
    with stand_in() as device:
        assert torch.accelerator.current_accelerator(check_available=True).type == device.type == NAME
    assert torch.accelerator.current_accelerator(check_available=True) is None


@pytest.mark.parametrize(
    "mix",
    [
        lambda there, here: there + here,
        lambda there, here: torch.cat([there, here]),
        lambda there, here: torch.where(there > 0, there, here),
        lambda there, here: here[there.long()],
        lambda there, here: there.index_put_((torch.arange(4),), here),
        lambda there, here: there.gather(0, torch.arange(4)),
    ],
)
def test_mixed_devices_are_refused(mix):
    there, here = torch.ones(4, device=NAME), torch.ones(4)
    with pytest.raises(RuntimeError, match=f"{NAME}.*cpu|cpu.*{NAME}"):
        mix(there, here)


def test_scalars_copies_and_indices_may_come_from_the_cpu():
    there = torch.arange(4.0, device=NAME)
    assert (there * torch.tensor(2.0)).tolist() == [0, 2, 4, 6]
    assert there[torch.tensor([3, 1])].tolist() == [3, 1]
    assert there.copy_(torch.ones(4)).tolist() == [1, 1, 1, 1]
    with pytest.raises((TypeError, RuntimeError), match="numpy"):
        there.numpy()


WAITS = {
    "item": lambda x, mask: x[0].item(),
    "bool": lambda x, mask: bool(x[0] > 0),
    "tolist": lambda x, mask: x.tolist(),
    "cpu": lambda x, mask: x.cpu(),
    "to": lambda x, mask: x.to("cpu"),
    "copy": lambda x, mask: torch.empty(4).copy_(x),
    "nonzero": lambda x, mask: x.nonzero(),
    "unique": lambda x, mask: x.unique(),
    "equal": lambda x, mask: torch.equal(x, x),
    "masked_select": lambda x, mask: x.masked_select(mask),
    "index by mask": lambda x, mask: x[mask],
    "assignment by mask": lambda x, mask: x.index_put_((mask,), x[:2] + 1),
    "repeat_interleave": lambda x, mask: x.repeat_interleave(x.long()),
}
GOES_ON = {
    "arithmetic": lambda x, mask: (x * 2).sum().clamp(min=1),
    "masked_fill": lambda x, mask: x.masked_fill(mask, 0),
    "masked_scatter": lambda x, mask: x.masked_scatter(mask, x),
    "fill by mask": lambda x, mask: x.__setitem__(mask, 0),
    "where": lambda x, mask: torch.where(mask, x, 0.0),
    "index": lambda x, mask: x[x.long()],
    "sort": lambda x, mask: x.sort(stable=True),
    "repeat_interleave of known size": lambda x, mask: x.repeat_interleave(x.long(), output_size=6),
    "copy to the device": lambda x, mask: torch.arange(4).to(x.device),
}


@pytest.mark.parametrize(
    ("call", "count"),
    [(call, 1) for call in WAITS.values()] + [(call, 0) for call in GOES_ON.values()],
    ids=[*WAITS, *GOES_ON],
)
def test_waits_are_counted(call, count):
    x, mask = torch.arange(4.0).to(NAME), torch.tensor([True, False, True, False]).to(NAME)
    with host_syncs() as syncs:
        call(x, mask)
    assert len(syncs) == count


def test_a_wait_names_the_innermost_line_outside_torch():
    """torch.unique and Tensor.__bool__ are torch's own; the line that called them is named."""
    x = torch.arange(3).to(NAME)
    with host_syncs() as syncs:
        if x[0] == 0:
            pass
        PRUNERS["uniform"](pruner_input(), torch.tensor([1]).to(NAME))
    assert syncs[0].file == "tests/method/test_stand_in.py"
    assert not syncs[0].is_ours
    assert [sync.file for sync in syncs if sync.is_ours] == ["dualspeed/pruners/selection.py"]
    assert syncs.ours() + syncs.others() == [*map(str, syncs[1:]), str(syncs[0])]


def test_copies_to_the_device_that_the_host_waits_for_are_listed():
    with host_syncs() as syncs:
        torch.ones(2).to(NAME, non_blocking=True)
        assert not syncs.uploads
        torch.ones(2).to(NAME)
    assert [upload.file for upload in syncs.uploads] == ["tests/method/test_stand_in.py"]


def pruner_input():
    """One image of two tokens on the stand-in."""
    from dualspeed.pruners import VisualTokens

    return VisualTokens(features=torch.ones(1, 2, 2).to(NAME))
