"""Packed rows have the losses and gradients of padded ones, in every family that packs."""

import pytest
import torch
from torch.testing import assert_close
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dualspeed import DualSpeedConfig, DualSpeedModel, Mode
from dualspeed.errors import ConfigError
from dualspeed.method.objective import Objective
from dualspeed.method.packing import check_packing
from dualspeed.method.vlm.families import family_of
from tests.support import tiny
from tests.support.families import FAMILIES, batch
from tests.support.varlen import STAND_IN, attention_by_lengths, by_lengths, use

BY_NAME = {family.name: family for family in FAMILIES}
PACKING = ("LLaVA-1.5", "LLaVA-NeXT", "LLaVA-OneVision", "Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL")
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def stand_in():
    with attention_by_lengths():
        yield


def depth_of(model: DualSpeedModel) -> int:
    """Layers of the language model."""
    return model.config.get_text_config().num_hidden_layers


def results(model: DualSpeedModel, inputs: dict, mode: Mode, packs: bool) -> tuple[dict, dict, list]:
    """Losses, gradients, and the shapes of the language model's inputs."""
    shapes = []
    hook = model.vlm.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    model.zero_grad()
    output = model(**inputs, mode=mode, objective=Objective(packs=packs))
    output.loss.backward()
    hook.remove()
    losses = {"ce": output.ce_loss, "distillation": output.distillation_loss}
    gradients = {name: values.grad for name, values in model.named_parameters() if values.grad is not None}
    return {name: loss.item() for name, loss in losses.items() if loss is not None}, gradients, shapes


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", PACKING)
def test_gradients_are_those_of_padded_rows(name, side, mode):
    """With the mask that transformers makes of the positions, and by cumulative lengths alone."""
    family = BY_NAME[name]
    model = DualSpeedModel(family.build().float(), DualSpeedConfig(pruning_ratio=0.7, num_virtual_tokens=3))
    inputs = batch(family, [1, 2, 0, 1], side)
    losses, gradients, shapes = results(model, inputs, mode, packs=False)
    assert {rows for rows, _ in shapes} == {4}
    assert len(gradients) > 20 and any(values.abs().max() > 1e-3 for values in gradients.values())
    for implementation in ("sdpa", STAND_IN):
        use(model.vlm, implementation)
        found, packed, packed_shapes = results(model, inputs, mode, packs=True)
        assert by_lengths.calls == (0 if implementation == "sdpa" else depth_of(model) * len(shapes))
        assert {rows for rows, _ in packed_shapes} == {1}
        # Without padding: a row of all tokens.
        if mode is Mode.SLOW:
            assert packed_shapes[-1][1] == inputs["attention_mask"].sum() < inputs["attention_mask"].numel()
        assert found == pytest.approx(losses, rel=1e-5)
        assert packed.keys() == gradients.keys()
        assert_close(packed, gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", PACKING)
def test_rows_of_text_alone_are_packed(name):
    family = BY_NAME[name]
    model = DualSpeedModel(family.build().float(), DualSpeedConfig())
    inputs = batch(family, [0, 0, 0])
    losses, gradients, _ = results(model, inputs, Mode.SLOW, packs=False)
    use(model.vlm, STAND_IN)
    found, packed, shapes = results(model, inputs, Mode.SLOW, packs=True)
    assert shapes == [(1, int(inputs["attention_mask"].sum()))]
    assert by_lengths.calls == depth_of(model)
    assert found == pytest.approx(losses, rel=1e-5)
    assert_close(packed, gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("name", ["LLaVA-1.5", "Qwen2.5-VL", "Qwen3-VL"])
def test_flex_attention_gives_the_gradients_of_padded_rows(name, mode, monkeypatch):
    """By torch's own formula of it: its kernels don't compile for a CPU, where torch allows no backward pass."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    family = BY_NAME[name]
    model = DualSpeedModel(family.build().float(), DualSpeedConfig(pruning_ratio=0.7))
    inputs = batch(family, [1, 2, 0, 1])
    losses, gradients, _ = results(model, inputs, mode, packs=False)
    use(model.vlm, "flex_attention")
    masks = []
    stock = ALL_ATTENTION_FUNCTIONS["flex_attention"]
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS._global_mapping,
        "flex_attention",
        lambda module, query, key, value, mask, **others: (
            masks.append(mask) or stock(module, query, key, value, mask, **others)
        ),
    )
    with torch.compiler.set_stance("force_eager"):
        found, packed, shapes = results(model, inputs, mode, packs=True)
    assert {rows for rows, _ in shapes} == {1}
    assert len(masks) >= depth_of(model) and {type(mask).__name__ for mask in masks} == {"BlockMask"}
    assert found == pytest.approx(losses, rel=1e-5)
    assert packed.keys() == gradients.keys()
    assert_close(packed, gradients, atol=1e-5, rtol=1e-4)


def test_the_families_that_pack_are_tested():
    found = {family.name for family in FAMILIES if family_of(family.build()).packs_rows}
    assert found == set(PACKING)


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention", "kernels-community/flash-attn2"])
def test_attention_that_reads_lengths_packs(implementation):
    vlm = tiny.llava()
    use(vlm, implementation)
    check_packing(vlm, GPU)


REFUSED = {
    "sdpa": ("sdpa", "LLaVA-1.5", {}, GPU, "packing: the language model's attention is 'sdpa', which reads no cumulat"),
    "eager": ("eager", "LLaVA-1.5", {}, GPU, "attention is 'eager', .* 15-99 % slower on a CPU"),
    "family": ("flash_attention_2", "Gemma 3", {}, GPU, "packing: Gemma3ForConditionalGeneration was not compared; "),
    "layers": (
        *("flash_attention_2", "LLaVA-1.5", {"layer_types": ["full_attention", "linear_attention"]}, GPU),
        "packing: layers of linear_attention would carry one row into the next",
    ),
    "cpu": ("flex_attention", "LLaVA-1.5", {}, CPU, "packing: flex_attention has no backward pass on a CPU"),
    "dropout": (
        "flex_attention",
        "LLaVA-1.5",
        {"attention_dropout": 0.1},
        GPU,
        "no dropout, and attention_dropout is 0.1",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_mix_rows_or_cost_more_is_refused(name):
    implementation, family, settings, device, reason = REFUSED[name]
    vlm = BY_NAME[family].build()
    use(vlm, implementation)
    for setting, value in settings.items():
        setattr(vlm.config.get_text_config(), setting, value)
    with pytest.raises(ConfigError, match=reason) as raised:
        check_packing(vlm, device)
    assert "\n" not in str(raised.value)
