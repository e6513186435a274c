"""The published implementation's numbers, reproduced to 1e-5."""

import pytest
import torch

from dualspeed import DualSpeedModel, Mode
from dualspeed.method.fast_mode import encode_batch, prune_batch
from dualspeed.method.sequences import Sequences
from dualspeed.pruners import VisualTokens, get_pruner
from tests.support.golden import ARRAYS, CASES, batch, golden_model

NUM_KEEP = {0.5: 32, 0.75: 16, 0.9: 6}
TOLERANCE = 1e-5
# name in cases.json -> prefixes of parameters in a DualSpeedModel
PARTS = {
    "mm_projector": ["vlm.model.multi_modal_projector."],
    "llm_layers": ["vlm.model.language_model.layers."],
    "embed_tokens": ["vlm.model.language_model.embed_tokens."],
    "norm": ["vlm.model.language_model.norm."],
    "lm_head": ["vlm.lm_head."],
    "llm_layer0": ["vlm.model.language_model.layers.0."],
    "llm_layer1": ["vlm.model.language_model.layers.1."],
    "llm_layer2": ["vlm.model.language_model.layers.2."],
}


def grad_norm(model: DualSpeedModel, prefixes: list[str]) -> float:
    grads = [p.grad for name, p in model.named_parameters() if name.startswith(tuple(prefixes)) and p.grad is not None]
    return torch.stack([grad.norm() for grad in grads]).norm().item()


def assert_gradients(model: DualSpeedModel, case: str, mode: str) -> None:
    """Gradient norms of every part agree, and whole gradients where they are stored."""
    golden = CASES["cases"][case]
    for part, prefixes in PARTS.items():
        if f"{mode}.grad_norm.{part}" in golden:
            assert grad_norm(model, prefixes) == pytest.approx(golden[f"{mode}.grad_norm.{part}"], rel=TOLERANCE)
    for name, parameter in model.named_parameters():
        stored = ARRAYS.get(f"{case}/grad/{mode}/{name.removeprefix('vlm.')}")
        stored = ARRAYS.get(f"{case}/grad/{mode}/mode_isolator") if name == "mode_isolator.weight" else stored
        if stored is not None:
            torch.testing.assert_close(parameter.grad, stored, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("pruning_ratio", NUM_KEEP)
def test_divprune_keeps_the_published_tokens(pruning_ratio):
    features = ARRAYS["main/projected_features"]
    kept = get_pruner("divprune")(VisualTokens(features=features), torch.full((3,), NUM_KEEP[pruning_ratio]))
    share = round(1 - pruning_ratio, 2)
    assert torch.equal(kept, ARRAYS[f"main/divprune_keep{share:g}"])


def test_projected_features():
    model = golden_model()
    images = encode_batch(model, {"pixel_values": ARRAYS["main/pixel_values"]})
    torch.testing.assert_close(torch.stack(images.features), ARRAYS["main/projected_features"], atol=1e-5, rtol=1e-5)


def test_full_loss_and_gradients_are_baselines():
    model = golden_model()
    output = model(mode=Mode.SLOW, distill=False, **batch("main"))
    assert output.loss.item() == pytest.approx(CASES["cases"]["main"]["full.loss"], rel=TOLERANCE)
    assert output.distillation_loss == 0.0
    torch.testing.assert_close(output.logits, ARRAYS["main/full/sup_logits"], atol=TOLERANCE, rtol=TOLERANCE)
    output.loss.backward()
    assert_gradients(model, "main", "full")


@pytest.mark.parametrize("pruning_ratio", NUM_KEEP)
def test_fast_loss_logits_and_gradients(pruning_ratio):
    model, mode = golden_model(pruning_ratio), f"fast_prune{pruning_ratio}"
    output = model(mode=Mode.FAST, **batch("main"))
    golden = CASES["cases"]["main"]
    assert output.loss.item() == pytest.approx(golden[f"{mode}.loss"], rel=TOLERANCE)
    assert output.distillation_loss is None
    torch.testing.assert_close(output.logits, ARRAYS[f"main/{mode}/sup_logits"], atol=TOLERANCE, rtol=TOLERANCE)
    output.loss.backward()
    assert_gradients(model, "main", mode)
    isolator_norm = model.mode_isolator.weight.grad.norm().item()
    assert isolator_norm == pytest.approx(golden[f"{mode}.grad_norm.mode_isolator"], rel=TOLERANCE)
    assert all(p.grad is None for p in model.vlm.model.vision_tower.parameters())


@pytest.mark.parametrize("pruning_ratio", NUM_KEEP)
def test_compacted_batch(pruning_ratio):
    model = golden_model(pruning_ratio)
    inputs = batch("main")
    images = encode_batch(model, {"pixel_values": inputs.pop("pixel_values")})
    compacted, _ = prune_batch(
        model, Sequences(inputs["input_ids"], inputs["attention_mask"], inputs["labels"]), images, None
    )
    mode = f"main/fast_prune{pruning_ratio}"
    assert torch.equal(compacted.labels, ARRAYS[f"{mode}/labels"])
    assert torch.equal(compacted.attention_mask.bool(), ARRAYS[f"{mode}/attention_mask"].bool())


@pytest.mark.parametrize("pruning_ratio", NUM_KEEP)
def test_slow_losses_and_gradients(pruning_ratio):
    model, mode = golden_model(pruning_ratio), f"slow_prune{pruning_ratio}"
    golden = CASES["cases"]["main"]
    output = model(mode=Mode.SLOW, **batch("main"))
    assert output.loss.item() == pytest.approx(golden[f"{mode}.total"], rel=TOLERANCE)
    assert output.ce_loss.item() == pytest.approx(golden[f"{mode}.student_ce"], rel=TOLERANCE)
    assert output.distillation_loss.item() == pytest.approx(golden[f"{mode}.distill"], rel=TOLERANCE)
    output.loss.backward()
    assert_gradients(model, "main", mode)
    # In the graph, unlike in the published code, but without effect.
    assert torch.equal(model.mode_isolator.weight.grad, torch.zeros_like(model.mode_isolator.weight))


@pytest.mark.parametrize("case", ["two_images", "all_text"])
def test_two_images_in_a_sample_and_no_image_at_all(case):
    golden = CASES["cases"][case]
    model = golden_model()
    fast = model(mode=Mode.FAST, **batch(case))
    assert fast.loss.item() == pytest.approx(golden["fast_prune0.9.loss"], rel=TOLERANCE)
    fast.loss.backward()
    isolator_norm = model.mode_isolator.weight.grad.norm().item()
    assert isolator_norm == pytest.approx(golden["fast_prune0.9.grad_norm.mode_isolator"], rel=TOLERANCE)
    slow = model(mode=Mode.SLOW, **batch(case))
    assert slow.loss.item() == pytest.approx(golden["slow_prune0.9.total"], rel=TOLERANCE)
    assert slow.ce_loss.item() == pytest.approx(golden["slow_prune0.9.student_ce"], rel=TOLERANCE)
    assert slow.distillation_loss.item() == pytest.approx(golden["slow_prune0.9.distill"], rel=TOLERANCE, abs=1e-7)


@pytest.mark.parametrize("name", CASES["trajectories"])
def test_trajectory(name):
    """Six steps F F S F S F; the isolator must not move in slow ones, although AdamW's momentum would move it."""
    model = golden_model()
    parameters = [p for p in model.parameters() if p.requires_grad]
    if "sgd" in name:
        optimizer = torch.optim.SGD(parameters, lr=0.05)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
    for mode, loss, student_ce, divergence in CASES["trajectories"][name]:
        optimizer.zero_grad()
        output = model(mode=Mode(mode), **batch("main"))
        assert output.loss.item() == pytest.approx(loss, rel=TOLERANCE)
        if mode == "slow":
            assert output.ce_loss.item() == pytest.approx(student_ce, rel=TOLERANCE)
            assert output.distillation_loss.item() == pytest.approx(divergence, rel=TOLERANCE)
        output.loss.backward()
        if mode == "slow":
            model.mode_isolator.weight.grad = None  # as the trainer does
        optimizer.step()
