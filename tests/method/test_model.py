"""The model's two modes on stock LLaVA-1.5 and LLaVA-NeXT architectures with random weights."""

import pytest
import torch
from safetensors import safe_open
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText

from dualspeed import DualSpeedConfig, DualSpeedModel, Mode, ModeIsolator
from dualspeed.method.checkpoint import load_vlm
from dualspeed.method.fast_mode import encode_batch, keep_tokens, prune_batch
from dualspeed.method.sequences import Sequences, prune_inputs
from dualspeed.method.vlm.tower import warn_of_missing_cls_token
from dualspeed.method.vlm.vision import encode_images, pruning_units
from dualspeed.pruners import PRUNERS, VisualTokens
from tests.support import tiny
from tests.support.batches import IMAGE_TOKEN, collate, next_shape, sample

MODELS = {"llava": tiny.llava, "llava_next": tiny.llava_next}


def mixed_batch(family: str, padding_side: str = "right") -> dict[str, torch.Tensor]:
    """Batch of samples with 1, 0, 2 and 1 images."""
    return collate([sample(family, seed, count) for seed, count in enumerate((1, 0, 2, 1))], padding_side)


def image_part(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: batch[name] for name in ("pixel_values", "image_sizes") if name in batch}


def dualspeed(family: str, **settings) -> DualSpeedModel:
    torch.manual_seed(0)
    return DualSpeedModel(MODELS[family](), DualSpeedConfig(**settings))


def gradients(model: DualSpeedModel) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("family", MODELS)
def test_fast_mode_keeping_all_tokens_without_isolator_equals_slow_mode(family, pruner):
    settings = {"pruner": pruner, "pruning_ratio": 0.0, "num_virtual_tokens": 0, "distillation_weight": 0.0}
    fast, slow = dualspeed(family, **settings), dualspeed(family, **settings)
    batch = mixed_batch(family)
    fast_output, slow_output = fast(mode=Mode.FAST, **batch), slow(mode=Mode.SLOW, **batch)
    assert_close(fast_output.loss, slow_output.loss, atol=1e-6, rtol=1e-6)
    assert_close(fast_output.logits, slow_output.logits, atol=1e-5, rtol=1e-5)
    fast_output.loss.backward()
    slow_output.loss.backward()
    assert_close(gradients(fast), gradients(slow), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", MODELS)
def test_slow_mode_without_distillation_is_the_stock_loss(family):
    batch = mixed_batch(family)
    loss = dualspeed(family)(mode=Mode.SLOW, distill=False, **batch).loss
    assert_close(loss, MODELS[family]()(**batch).loss, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("budget", ["image", "tile"])
@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("family", MODELS)
def test_batched_equals_alone_on_either_padding_side(family, mode, budget):
    """A sample's loss depends neither on its batch mates nor on the side that is padded."""
    model = dualspeed(family, pruning_ratio=0.7, prune_budget=budget)
    samples = [sample(family, seed, count) for seed, count in enumerate((1, 0, 2, 1))]
    alone = torch.stack([model(mode=mode, **collate([one])).loss for one in samples])
    for padding_side in ("right", "left"):
        batched = model(mode=mode, **collate(samples, padding_side))
        # Each sample has five supervised tokens, so that the batch's mean is the mean of the samples' means.
        assert_close(batched.loss, alone.mean(), atol=2e-6, rtol=2e-6)
        per_sample = model(mode=mode, **collate([samples[2], samples[0]], padding_side)).loss
        assert_close(per_sample, (alone[2] + alone[0]) / 2, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("family", MODELS)
def test_batched_equals_alone_with_every_pruner(family, pruner):
    """No input of a pruner, the question included, depends on batch mates or padding."""
    model = dualspeed(family, pruner=pruner, pruning_ratio=0.5)
    samples = [sample(family, seed, count) for seed, count in enumerate((1, 0, 2, 1))]
    alone = torch.stack([model(mode=Mode.FAST, **collate([one])).loss for one in samples])
    for padding_side in ("right", "left"):
        batched = model(mode=Mode.FAST, **collate(samples, padding_side)).loss
        assert_close(batched, alone.mean(), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("pruner", ["prumerge", "tome"])
def test_merged_vectors_teach_the_projector_what_was_merged(pruner):
    """Gradients of the projector equal those of the same weighted sums computed directly."""
    model = dualspeed("llava", pruner=pruner, pruning_ratio=0.75)
    batch = collate([sample("llava", 0, 1)])
    images = encode_batch(model, image_part(batch))
    features = torch.cat(images.features)
    units, _ = pruning_units(images, None)
    described = {name: values[None] for name, values in images.described.items()}
    merged = PRUNERS[pruner](VisualTokens(features[None], **described), torch.tensor([4]))
    _, kept = keep_tokens(model, features, units, torch.tensor([4]), images.described, None)
    by_model, by_hand = (
        torch.autograd.grad(
            vectors.square().sum(), model.vlm.model.multi_modal_projector.parameters(), retain_graph=True
        )
        for vectors in (kept[0], merged.features[0])
    )
    assert_close(by_model, by_hand)
    assert all(gradient.abs().sum() > 0 for gradient in by_model)


@pytest.mark.parametrize("family", MODELS)
def test_losses_are_shares_of_the_whole_step(family):
    model = dualspeed(family)
    batch = mixed_batch(family)
    for mode in Mode:
        mean = model(mode=mode, **batch)
        share = model(mode=mode, num_items_in_batch=torch.tensor(80), **batch)
        assert_close(share.loss, mean.loss * 20 / 80)


def test_fast_sequence_has_isolator_then_kept_tokens():
    """576 -> 57 in the paper; here 16 -> 4 tokens behind an isolator of 3."""
    model = dualspeed("llava", pruning_ratio=0.75, num_virtual_tokens=3)
    batch = collate([sample("llava", 0, 1)])
    images = encode_images(model.vlm, image_part(batch))
    inputs = Sequences(batch["input_ids"], batch["attention_mask"], batch["labels"])
    compacted, output = prune_batch(model, inputs, images, None)
    features = output.pooler_output
    is_image = batch["input_ids"][0] == IMAGE_TOKEN
    assert compacted.input_ids[0].tolist() == (
        batch["input_ids"][0][:5].tolist()
        + [IMAGE_TOKEN] * (3 + 4)
        + batch["input_ids"][0][5 + is_image.sum() :].tolist()
    )
    assert torch.equal(features[0][:3], model.mode_isolator.weight)
    assert all(any(torch.equal(row, feature) for feature in images.features[0]) for row in features[0][3:])


def test_tile_budget_is_the_published_setting():
    """Each tile keeps its share of its tokens behind an isolator; newlines are dropped."""
    model = dualspeed("llava_next", pruning_ratio=0.75, num_virtual_tokens=2, prune_budget="tile")
    size = torch.tensor([[56, 56]])
    num_tiles, num_tokens = next_shape(size[0])
    assert (num_tiles, num_tokens) == (5, 16 + 64 + 8)
    pixel_values = torch.randn(1, num_tiles, 3, 28, 28)
    ids = torch.tensor([[1, *[IMAGE_TOKEN] * num_tokens, 6]])
    images = encode_batch(model, {"pixel_values": pixel_values, "image_sizes": size})
    compacted, output = prune_batch(model, Sequences(ids, torch.ones_like(ids), None), images, torch.tensor([0]))
    features = output.pooler_output
    assert [len(unit) for unit in features] == [2 + 4] * 5
    assert (compacted.input_ids == IMAGE_TOKEN).sum() == 5 * (2 + 4)
    newline = model.vlm.model.image_newline
    assert not any(torch.equal(row, newline) for unit in features for row in unit)


@pytest.mark.parametrize("family", MODELS)
def test_cls_attention_is_the_eager_towers(family):
    """Attention from one layer's q and k equals what the tower returns without fused attention."""
    vlm = MODELS[family]()
    batch = collate([sample(family, seed, 1) for seed in range(3)])
    images = encode_images(vlm, image_part(batch), needs=("cls_attention",))
    tower = vlm.model.vision_tower
    tower.set_attn_implementation("eager")
    pixels = batch["pixel_values"]
    if family == "llava_next":
        tiles = [next_shape(size)[0] for size in batch["image_sizes"]]
        pixels = torch.cat([image[:count] for image, count in zip(pixels, tiles, strict=True)])
    attention = tower(pixels, output_attentions=True).attentions[-2].mean(dim=1)[:, 0, 1:]
    if family == "llava":
        assert_close(images.described["cls_attention"], attention.flatten(), atol=1e-6, rtol=1e-5)
    else:
        # The base tile comes first and unchanged; newlines have no attention.
        base = images.described["cls_attention"][: tiny.NUM_IMAGE_TOKENS]
        assert_close(base, attention[0], atol=1e-6, rtol=1e-5)
        packed = torch.cat(images.features)
        is_newline = (packed == vlm.model.image_newline).all(dim=-1)
        assert torch.equal(images.described["cls_attention"] == -torch.inf, is_newline)


def test_tower_without_cls_token_scores_by_received_attention(caplog):
    vlm = tiny.llava_siglip()
    pixel_values = collate([sample("llava", seed, 1) for seed in range(3)])["pixel_values"]
    warn_of_missing_cls_token.cache_clear()
    for _ in range(2):
        images = encode_images(vlm, {"pixel_values": pixel_values}, needs=("cls_attention",))
    assert [record.message for record in caplog.records if "no CLS token" in record.message] == [
        "SiglipVisionModel has no CLS token: pruners score tokens by the mean attention they receive instead"
    ]
    tower = vlm.model.vision_tower
    tower.set_attn_implementation("eager")
    attention = tower(pixel_values, output_attentions=True).attentions[-2].mean(dim=(1, 2))
    assert_close(images.described["cls_attention"], attention.flatten(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("pruner", ["fastervlm", "visionzip", "prumerge", "vispruner"])
def test_attention_pruners_train_without_cls_token(pruner):
    model = DualSpeedModel(tiny.llava_siglip(), DualSpeedConfig(pruner=pruner, pruning_ratio=0.75))
    loss = model(mode=Mode.FAST, **mixed_batch("llava")).loss
    loss.backward()
    assert model.mode_isolator.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("family", MODELS)
def test_keys_and_pre_projection_belong_to_their_tokens(family):
    """Captured features, projected again, equal the features; keys are those of the selected layer."""
    vlm = MODELS[family]()
    batch = collate([sample(family, seed, 1) for seed in range(3)])
    images = encode_images(vlm, image_part(batch), needs=("keys", "pre_projection", "cls_attention"))
    features, described = torch.cat(images.features), images.described
    is_patch = described["cls_attention"] > -torch.inf
    projected = vlm.model.multi_modal_projector(described["pre_projection"])
    assert_close(projected[is_patch], features[is_patch], atol=1e-5, rtol=1e-5)
    assert not described["pre_projection"][~is_patch].any()
    tower = vlm.model.vision_tower
    before = tower(batch["pixel_values"].flatten(0, -4)[:1], output_hidden_states=True).hidden_states[-3]
    layer = tower.encoder.layers[-2]
    keys = layer.self_attn.k_proj(layer.layer_norm1(before))[0, 1:]
    assert_close(described["keys"][: tiny.NUM_IMAGE_TOKENS].flatten(1), keys, atol=1e-5, rtol=1e-5)


def test_unused_vision_layers_are_skipped_and_come_back():
    vlm = tiny.llava()
    calls = []
    for index, layer in enumerate(vlm.model.vision_tower.encoder.layers):
        layer.register_forward_hook(lambda *_, index=index: calls.append(index))
    encode_images(vlm, {"pixel_values": torch.randn(1, 3, 28, 28)})
    assert calls == [0, 1]
    assert len(vlm.model.vision_tower.encoder.layers) == 3
    states = vlm.model.vision_tower(torch.randn(1, 3, 28, 28), output_hidden_states=True).hidden_states
    assert len(states) == 4
    assert all(state is not None for state in states)


def test_teacher_runs_without_dropout():
    vlm = tiny.llava(dropout=0.5)
    model = DualSpeedModel(vlm, DualSpeedConfig(pruning_ratio=0.0, num_virtual_tokens=0)).train()
    batch = mixed_batch("llava")
    with_dropout = model(mode=Mode.SLOW, **batch)
    assert with_dropout.distillation_loss > 1e-4
    # Without dropout in the student, teacher and student are the same function of the same input.
    assert model.eval()(mode=Mode.SLOW, **batch).distillation_loss.item() == pytest.approx(0, abs=1e-6)
    assert all(module.training for module in model.train().modules())


@pytest.mark.parametrize("mode", list(Mode))
def test_text_only_batch_has_the_stock_loss_and_reaches_every_parameter(mode):
    model = dualspeed("llava_next")
    batch = collate([sample("llava_next", seed, 0) for seed in range(2)])
    output = model(mode=mode, **batch)
    assert_close(output.loss, tiny.llava_next()(**batch).loss, atol=1e-6, rtol=1e-6)
    assert output.distillation_loss == (None if mode is Mode.FAST else 0.0)
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert model.mode_isolator.weight.grad.abs().sum() == 0


@pytest.mark.parametrize("mode", list(Mode))
def test_batch_without_supervision_has_a_loss_of_zero(mode):
    model = dualspeed("llava")
    batch = mixed_batch("llava")
    batch["labels"] = torch.full_like(batch["labels"], -100)
    output = model(mode=mode, **batch)
    output.loss.backward()
    assert output.loss == 0.0
    assert all(p.grad.abs().sum() == 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("mode", list(Mode))
def test_placeholders_and_features_that_disagree_are_refused_with_both_counts(mode):
    model = dualspeed("llava")
    batch = collate([sample("llava", 0, 1)])
    batch["input_ids"][0, 5] = 7
    with pytest.raises(ValueError, match=r"15.*16"):
        model(mode=mode, **batch)


def test_prune_inputs_keeps_the_side_that_is_asked_for():
    ids = torch.tensor([[9, 4, 4, 4, 8], [7, 6, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    copies = torch.tensor([0, 3, 1])
    right = prune_inputs(Sequences(ids, mask, ids), 4, copies)
    left = prune_inputs(Sequences(ids, mask, None), 4, copies, padding_side="left")
    assert right.input_ids.tolist() == [[9, 4, 4, 4, 4, 8], [7, 6, 0, 0, 0, 0]]
    assert right.labels[1].tolist() == [7, 6, -100, -100, -100, -100]
    assert left.input_ids.tolist() == [[9, 4, 4, 4, 4, 8], [0, 0, 0, 0, 7, 6]]
    assert left.attention_mask.tolist() == [[1] * 6, [0, 0, 0, 0, 1, 1]]


def test_isolator_starts_at_the_scale_of_the_features():
    isolator = ModeIsolator(1000, 64)
    assert isolator.weight.abs().max() <= 1 / 8
    assert isolator.weight.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.02)
    assert torch.equal(isolator(), isolator.weight)


@pytest.mark.parametrize("family", MODELS)
def test_generation_in_either_mode(family):
    model = dualspeed(family, pruning_ratio=0.0, num_virtual_tokens=0).eval()
    samples = [sample(family, seed, count) for seed, count in enumerate((1, 0, 2))]
    arguments = {"max_new_tokens": 5, "do_sample": False}

    def answers(samples: list[dict], mode: Mode, model: DualSpeedModel = model) -> torch.Tensor:
        batch = collate(samples, "left")
        del batch["labels"]
        output = model.generate(mode=mode, **batch, **arguments)
        assert torch.equal(output[:, : batch["input_ids"].shape[1]], batch["input_ids"])
        return output[:, batch["input_ids"].shape[1] :]

    slow = answers(samples, Mode.SLOW)
    assert torch.equal(answers(samples, Mode.FAST), slow)
    pruning = dualspeed(family, pruning_ratio=0.8).eval()
    fast = answers(samples, Mode.FAST, pruning)
    for index, one in enumerate(samples):
        alone = answers([one], Mode.FAST, pruning)[0]
        assert torch.equal(fast[index, : len(alone)], alone)


def test_checkpoint_is_stock_with_the_isolator_beside(tmp_path):
    base = tiny.make_llava(tmp_path / "base")
    model = DualSpeedModel(load_vlm(base), DualSpeedConfig(pruner="random", pruning_ratio=0.5))
    model.save_pretrained(tmp_path / "saved")
    names = {
        folder: set(safe_open(tmp_path / folder / "model.safetensors", "pt").keys()) for folder in ("base", "saved")
    }
    assert names["saved"] == names["base"]
    assert "vision_tower.vision_model.embeddings.class_embedding" in names["saved"]
    assert "language_model.model.embed_tokens.weight" in names["saved"]
    assert safe_open(tmp_path / "saved" / "mode_isolator.safetensors", "pt").keys() == ["mode_isolator.weight"]

    batch = mixed_batch("llava")
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    again = DualSpeedModel.from_pretrained(tmp_path / "saved")
    assert again.dualspeed == model.dualspeed
    assert torch.equal(stock(**batch).logits, model.vlm(**batch).logits)
    assert torch.equal(again(mode=Mode.FAST, **batch).loss, model(mode=Mode.FAST, **batch).loss)


def test_loading_refuses_weights_that_do_not_fit(tmp_path):
    from safetensors.torch import load_file, save_file

    base = tiny.make_llava(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["language_model.model.layers.0.extra"] = weights.pop("multi_modal_projector.linear_1.bias")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"extra.*linear_1\.bias|linear_1\.bias.*extra"):
        load_vlm(base)


def test_isolator_of_another_length_is_refused(tmp_path):
    base = tiny.make_llava(tmp_path / "base")
    DualSpeedModel(load_vlm(base), DualSpeedConfig(num_virtual_tokens=4)).save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"shape \(4, 48\).*\(8, 48\)"):
        DualSpeedModel.from_pretrained(tmp_path / "saved", DualSpeedConfig(num_virtual_tokens=8))
