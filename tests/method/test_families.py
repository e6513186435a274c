"""Every supported family: the properties that make fast mode right, on tiny models of its real classes."""

import os
import re
from importlib import import_module

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close
from transformers import Blip2Config, Blip2ForConditionalGeneration, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_torchvision_available

from dualspeed import DualSpeedConfig, DualSpeedModel, LoraRecipe, Mode, add_adapters
from dualspeed.batch import TOKEN_INPUTS
from dualspeed.method.adapters import load_adapters
from dualspeed.method.fast_mode import encode_batch, observe_pruning, prune_batch
from dualspeed.method.sequences import Sequences
from dualspeed.method.vlm.families import CAPTURED_FIELDS, family_of
from dualspeed.method.vlm.inputs import image_inputs, token_inputs
from dualspeed.method.vlm.parts import projector
from dualspeed.method.vlm.square_towers import standardised
from dualspeed.method.vlm.tower import drops_first_position, has_cls_token, per_token, selected_attention
from dualspeed.method.vlm.vision import encode_images, tiles_per_image
from dualspeed.pruners import PRUNERS, num_tokens_to_keep
from dualspeed.training.trainable import parts_of, set_trainable
from tests.support.families import IMAGE, Family, batch
from tests.support.first_rank import ALL_FAMILIES as FAMILIES
from tests.support.model_trials import processor_needs_torchvision
from tests.support.paths import REPOSITORY

by_family = pytest.mark.parametrize("family", FAMILIES, ids=[family.name for family in FAMILIES])
MIXED = [1, 0, 2, 1]
MERGERS = [family for family in FAMILIES if family_of(family.build()).merges_patches]
merger_families = pytest.mark.parametrize("family", MERGERS, ids=[family.name for family in MERGERS])
TOWERS = [family for family in FAMILIES if family_of(family.build()).has_readable_tower]
tower_families = pytest.mark.parametrize("family", TOWERS, ids=[family.name for family in TOWERS])
TILE_TOWERS = [family for family in TOWERS if family not in MERGERS]
tile_tower_families = pytest.mark.parametrize("family", TILE_TOWERS, ids=[family.name for family in TILE_TOWERS])


def model_of(family: Family, **settings) -> DualSpeedModel:
    torch.manual_seed(0)
    return DualSpeedModel(family.build(), DualSpeedConfig(**settings))


@by_family
def test_slow_mode_without_distillation_is_the_stock_loss(family):
    for num_images in (MIXED, [0, 0]):
        inputs = batch(family, num_images)
        stock = family.build()(**inputs).loss
        assert_close(model_of(family)(mode=Mode.SLOW, distill=False, **inputs).loss, stock, atol=1e-5, rtol=1e-5)


@by_family
def test_fast_mode_keeping_all_without_isolator_is_the_stock_loss(family):
    inputs = batch(family, MIXED)
    settings = {"pruning_ratio": 0.0, "num_virtual_tokens": 0}
    loss = model_of(family, **settings)(mode=Mode.FAST, **inputs).loss
    assert_close(loss, family.build()(**inputs).loss, atol=1e-5, rtol=1e-5)


@by_family
@pytest.mark.parametrize("pruner", ["divprune", "random", "cdpruner"])
@pytest.mark.parametrize("mode", list(Mode))
def test_batched_equals_alone_on_either_padding_side(family, mode, pruner):
    model = model_of(family, pruning_ratio=0.5, pruner=pruner)
    alone = torch.stack(
        [model(mode=mode, **batch(family, [count], seed=seed)).loss for seed, count in enumerate(MIXED)]
    )
    for padding_side in ("right", "left"):
        batched = model(mode=mode, **batch(family, MIXED, padding_side)).loss
        assert_close(batched, alone.mean(), atol=1e-4, rtol=1e-4)


@by_family
def test_fast_mode_at_90_percent_trains(family):
    """The loss falls over 20 steps; language model, projector and isolator change, the tower doesn't."""
    model = model_of(family, pruning_ratio=0.9)
    set_trainable(model, "finetune")
    assert any(part == "projector" and "isolator" not in name for name, part in parts_of(model).items())
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen
    inputs = batch(family, MIXED)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in trained]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    losses = []
    for _ in range(20):
        loss = model(mode=Mode.FAST, **inputs).loss
        optimizer.zero_grad()
        loss.backward()
        assert model.mode_isolator.weight.grad.abs().sum() > 0
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all((parameter != start).any() for parameter, start in zip(trained, before, strict=True))
    assert_close(frozen, {name: p for name, p in model.named_parameters() if not p.requires_grad}, atol=0, rtol=0)


@by_family
def test_adapters_of_the_language_model_learn_in_fast_mode(family):
    """LoRA changes nothing at the start; a fast step reaches every adapter, the projector and the isolator."""
    inputs = batch(family, MIXED)
    before = model_of(family)(mode=Mode.FAST, **inputs).loss
    torch.manual_seed(0)
    vlm = family.build()
    add_adapters(vlm, LoraRecipe(rank=2, alpha=4, dropout=0.0))
    model = DualSpeedModel(vlm, DualSpeedConfig())
    model.mode_isolator.load_state_dict(model_of(family).mode_isolator.state_dict())
    set_trainable(model, "finetune")
    loss = model(mode=Mode.FAST, **inputs).loss
    assert_close(loss, before, atol=1e-5, rtol=1e-5)
    loss.backward()
    parts = parts_of(model)
    adapters = {name for name in parts if ".lora_" in name}
    assert adapters
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == adapters | {name for name, part in parts.items() if part == "projector"}
    assert all(model.get_parameter(name).grad is not None for name in trained)


def adapted(family: Family, seed: int) -> PreTrainedModel:
    """Tiny model with adapters as if trained: an untrained adapter's product is 0."""
    vlm = family.build()
    torch.manual_seed(seed)
    add_adapters(vlm, LoraRecipe(rank=2, alpha=4, dropout=0.1))
    with torch.no_grad():
        for name, parameter in vlm.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.2)
    return vlm.eval()


@by_family
def test_merged_adapters_are_the_adapted_model(family, tmp_path):
    """The stock checkpoint, peft with `adapter/` on the base model, and a resumed model compute what was trained."""
    vlm = adapted(family, seed=0)
    DualSpeedModel(vlm, DualSpeedConfig()).save_pretrained(tmp_path)
    inputs = batch(family, MIXED)
    with torch.no_grad():
        logits = vlm(**inputs).logits
        base, stock = family.build().eval(), type(vlm).from_pretrained(tmp_path).eval()
        assert stock.state_dict().keys() == base.state_dict().keys()
        assert not torch.allclose(base(**inputs).logits, logits, atol=1e-3)
        assert_close(stock(**inputs).logits, logits, atol=1e-5, rtol=1e-5)
        resumed = adapted(family, seed=1)
        assert not torch.allclose(resumed(**inputs).logits, logits, atol=1e-3)
        load_adapters(resumed, tmp_path / "adapter")
        assert_close(resumed.state_dict(), vlm.state_dict(), atol=0, rtol=0)
        by_peft = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
        assert_close(by_peft.eval()(**inputs).logits, logits, atol=1e-5, rtol=1e-5)
        assert_close(by_peft.merge_and_unload()(**inputs).logits, logits, atol=1e-5, rtol=1e-5)


@by_family
def test_slow_mode_learns_from_fast_mode(family):
    output = model_of(family, pruning_ratio=0.9)(mode=Mode.SLOW, **batch(family, MIXED))
    assert output.distillation_loss > 0
    output.loss.backward()


@by_family
def test_kept_tokens_take_what_belongs_to_them_along(family):
    """Text and row tokens are kept; kept tokens keep their positions and token types."""
    model = model_of(family, pruning_ratio=0.5, num_virtual_tokens=2)
    inputs = batch(family, [2])
    # A further input by token holds each token's position, which shows the tokens that pruning kept.
    is_image = inputs["input_ids"] == IMAGE
    whole = Sequences(inputs["input_ids"], inputs["attention_mask"], inputs["labels"])
    places = torch.arange(is_image.shape[1])[None]
    pixels = image_inputs(model.vlm, image_side(inputs))
    by_token_inputs = token_inputs(model.vlm, inputs["input_ids"], inputs["attention_mask"], image_side(inputs), pixels)
    whole = whole._replace(by_token=by_token_inputs | {"places": places})
    images = encode_batch(model, pixels)
    pruned, output = prune_batch(model, whole, images, None)
    kept = pruned.by_token["places"][0]
    assert set(kept.tolist()) >= set(places[~is_image].tolist())
    assert (kept.diff() >= 0).all()
    for name, values in pruned.by_token.items():
        assert torch.equal(values, whole.by_token[name][..., kept])
    num_kept = (pruned.input_ids == IMAGE).sum() - 2 * len(images.features)
    assert num_kept == sum(num_tokens_to_keep(len(unit), 0.5) for unit in images.features)
    for layer, all_of_layer in zip(
        getattr(output, "deepstack_features", None) or [],
        getattr(images.output, "deepstack_features", None) or [],
        strict=True,
    ):
        of_image_tokens = torch.zeros(is_image.shape[1], 32)
        of_image_tokens[is_image[0]] = torch.cat(list(all_of_layer))
        rows, is_kept = torch.cat(layer), pruned.input_ids[0] == IMAGE
        isolator = torch.cat([torch.arange(len(unit)) < 2 for unit in layer])
        assert not rows[isolator].any()
        assert torch.equal(rows[~isolator], of_image_tokens[kept[is_kept]][~isolator])


def prompts(family: Family, num_images: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Batch of prompts for generation."""
    inputs = batch(family, num_images, padding_side="left", seed=seed)
    del inputs["labels"]
    if family.token_types:
        takes_images = family.token_types == "mm_token_type_ids" or family.name == "Gemma 3"
        inputs[family.token_types] = (inputs["input_ids"] == IMAGE).int() * takes_images
    return inputs


def generator_of(family: Family, **settings) -> DualSpeedModel:
    """Model that never generates an end or an image token."""
    model = model_of(family, **settings).eval()
    model.vlm.generation_config.eos_token_id = None
    model.vlm.generation_config.suppress_tokens = [IMAGE]
    return model


@by_family
def test_pruned_generation_is_greedy_decoding_of_the_pruned_sequence(family):
    """Each new token is the most likely one in a fast forward of all tokens before it; batches change nothing."""
    model = generator_of(family, pruning_ratio=0.9)
    inputs, new = prompts(family, [1, 2, 3]), 12
    arguments = {"mode": Mode.FAST, "max_new_tokens": new, "do_sample": False}
    generated = model.generate(**arguments, **inputs)
    assert generated.shape[1] == inputs["input_ids"].shape[1] + new
    # Prune the full sequence with the new tokens at its end, which gives the positions that generation used.
    asked = {name: torch.nn.functional.pad(values, (0, new), value=1) for name, values in by_token(inputs).items()}
    asked["input_ids"] = generated
    asked["labels"] = generated.clone()
    asked["labels"][:, :-new] = -100
    if not family.name.startswith("PaliGemma"):
        for name in TOKEN_INPUTS:
            asked.get(name, generated)[:, -new:] *= 0 if name in asked else 1
    logits = model(mode=Mode.FAST, **inputs | asked).logits
    logits[:, IMAGE] = -torch.inf
    assert torch.equal(generated[:, -new:], logits.argmax(dim=-1).view(-1, new))
    for seed, row in enumerate(generated):
        alone = model.generate(**arguments, **prompts(family, [seed + 1], seed=seed))
        assert torch.equal(alone[0, -new:], row[-new:])


@by_family
def test_generation_on_all_tokens_without_isolator_is_the_stock_models(family):
    model = generator_of(family, pruning_ratio=0.0, num_virtual_tokens=0)
    arguments = {"max_new_tokens": 6, "do_sample": False}
    for num_images in ([1, 2, 3], [2], [0, 1], [0]):
        inputs = prompts(family, num_images)
        # Twice in turns: neither may leave state (positions) that changes the other.
        for _ in range(2):
            stock = model.vlm.generate(**arguments, **inputs)
            for mode in Mode:
                assert torch.equal(model.generate(mode=mode, **arguments, **inputs), stock)


def by_token(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: inputs[name] for name in ("input_ids", "attention_mask", *TOKEN_INPUTS) if name in inputs}


def image_side(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: values for name, values in inputs.items() if name not in ("input_ids", "attention_mask", "labels")}


@by_family
def test_text_only_batch_of_one_of_two_ranks_calls_the_same_modules(family, monkeypatch):
    """A blank image goes through tower, projector and pruner; the loss stays that of the text."""
    inputs = batch(family, [0, 0])
    stock = family.build()(**inputs).loss
    monkeypatch.setattr("dualspeed.method.model.has_other_ranks", lambda: True)
    for mode in Mode:
        model = model_of(family)
        set_trainable(model, "finetune")
        loss = model(mode=mode, **inputs).loss
        assert_close(loss, stock, atol=1e-5, rtol=1e-5)
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@tile_tower_families
def test_attention_is_the_eager_towers(family):
    """Attention of the CLS token, or mean received attention: means over squares of patches, -inf for newlines."""
    vlm, images = family.build(), image_side(batch(family, [1, 2]))
    encoded = encode_images(vlm, image_inputs(vlm, images), needs=("cls_attention",))
    eager, weights = family.build(), []
    eager.set_attn_implementation("eager")
    selected_attention(eager).register_forward_hook(lambda module, args, output: weights.append(output[1]))
    eager.get_image_features(**image_inputs(eager, images), return_dict=True)
    maps = weights[0].mean(dim=1)
    scores = (maps[:, 0] if has_cls_token(eager) else maps.mean(dim=1))[:, int(drops_first_position(eager)) :]
    ours = encoded.described["cls_attention"]
    if family_of(vlm).packs_tiles:
        # Each image begins with its base tile, unchanged; only newlines are inserted.
        num_tiles = tiles_per_image(vlm, image_inputs(vlm, images))
        first_tiles = [scores[sum(num_tiles[:index])] for index in range(len(num_tiles))]
        starts = [row[:16] for row in ours.split([len(unit) for unit in encoded.features])]
        assert_close(torch.stack(starts), torch.stack(first_tiles), atol=1e-6, rtol=1e-5)
        newline = vlm.model.image_newline
        is_newline = torch.cat([(unit == newline).all(dim=-1) for unit in encoded.features])
        assert torch.equal(ours == -torch.inf, is_newline)
        return
    num_tokens = len(ours) // len(scores)
    side = int((scores.shape[1] // num_tokens) ** 0.5)
    squares = [
        tile.view(4, 4)[row : row + side, column : column + side].mean()
        for tile in scores
        for row in range(0, 4, side)
        for column in range(0, 4, side)
    ]
    assert_close(ours, torch.stack(squares), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["Gemma 3", "Idefics3", "InternVL", "SmolVLM"])
def test_a_token_stands_for_the_square_of_patches_that_it_is_made_of(name):
    vlm = next(family for family in FAMILIES if family.name == name).build()

    def tokens_of(patches: torch.Tensor) -> torch.Tensor:
        if name != "InternVL":
            return projector(vlm)(patches)
        return projector(vlm)(vlm.model.pixel_shuffle(patches.view(1, 4, 4, 32)).reshape(1, 4, 128))

    for patch in range(16):
        noise = torch.zeros(1, 16, 32)
        noise[0, patch] = torch.randn(32, generator=torch.Generator().manual_seed(patch))
        touched = (tokens_of(noise) != tokens_of(torch.zeros(1, 16, 32))).any(dim=-1)
        assert torch.equal(per_token(noise, 4).any(dim=-1), touched)


@merger_families
def test_attention_of_merged_patches_is_the_eager_towers(family, monkeypatch):
    """Mean received attention within an image or window, rotated, averaged over the square of each token."""
    vlm, images = family.build(), image_inputs(family.build(), image_side(batch(family, [1, 2])))
    ours = encode_images(vlm, images, needs=("cls_attention", "keys", "pre_projection")).described
    eager, maps, entered = family.build(), [], []
    attend = import_module(type(eager).__module__).eager_attention_forward

    def record(module, *states, **settings):
        output, weights = attend(module, *states, **settings)
        if module is selected_attention(eager):
            maps.append(weights[0].mean(dim=0).mean(dim=0))  # over heads, then over queries
        return output, weights

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "recorded", record)
    eager.model.visual.config._attn_implementation = "recorded"
    projector(eager).register_forward_hook(lambda module, args, output: entered.extend((args[0], output)))
    pooled = eager.get_image_features(**images, return_dict=True).pooler_output
    assert len(maps) >= 3  # one an image, or more where windows part them
    order = torch.tensor([int((entered[1] == token).all(dim=-1).nonzero()) for token in torch.cat(list(pooled))])
    assert_close(ours["cls_attention"], torch.cat(maps).view(-1, 4).mean(dim=1)[order], atol=1e-6, rtol=1e-5)
    assert_close(ours["pre_projection"], entered[0].view(-1, 4, 32).mean(dim=1)[order], atol=1e-6, rtol=1e-5)
    assert ours["keys"].shape == (len(order), 4, 8)


@pytest.mark.parametrize("last_is_full", [True, False])
def test_windows_part_what_patches_attend_to(last_is_full, monkeypatch):
    """Qwen2.5-VL's selected layer has windows, or not; the attention of each part sums to 1."""
    family = next(family for family in FAMILIES if family.name == "Qwen2.5-VL")
    vlm = family.build()
    vlm.model.visual.fullatt_block_indexes = [1] if last_is_full else [0]
    images = image_inputs(vlm, image_side(batch(family, [1])))
    lengths = []
    selected_attention(vlm).register_forward_pre_hook(
        lambda module, args, kwargs: lengths.extend(kwargs["cu_seqlens"].diff().tolist()), with_kwargs=True
    )
    attention = encode_images(vlm, images, needs=("cls_attention",)).described["cls_attention"]
    assert (len(lengths) == 1) == last_is_full
    assert_close(attention.sum() * 4, torch.tensor(float(len(lengths))), atol=1e-5, rtol=1e-5)


@tower_families
@pytest.mark.parametrize("pruner", ["fastervlm", "prumerge", "vispruner", "visionzip", "scope", "mmtok"])
def test_pruners_that_look_into_the_tower_prune_alike_in_any_batch(family, pruner):
    model = model_of(family, pruning_ratio=0.5, pruner=pruner)
    alone = [model(mode=Mode.FAST, **batch(family, [count], seed=seed)).loss for seed, count in enumerate(MIXED)]
    batched = model(mode=Mode.FAST, **batch(family, MIXED, "left")).loss
    assert_close(batched, torch.stack(alone).mean(), atol=1e-4, rtol=1e-4)


@merger_families
def test_features_before_the_merger_belong_to_their_tokens(family):
    """Patches as the stock merger gets them, in the squares that become tokens, standardised over the image."""
    vlm, entered = family.build(), []
    images = image_inputs(vlm, image_side(batch(family, [1, 2])))
    ours = encode_images(vlm, images, needs=("before_merger",)).described["before_merger"]
    projector(vlm).register_forward_hook(lambda module, args, output: entered.extend((args[0], output)))
    pooled = vlm.get_image_features(**images, return_dict=True).pooler_output
    # Rows of the merger's output are found again in the tokens, whatever order the tower has within.
    order = torch.tensor([int((entered[1] == token).all(dim=-1).nonzero()) for token in torch.cat(list(pooled))])
    assert sorted(order.tolist()) == list(range(len(order)))
    assert (order != torch.arange(len(order))).any() == (family.name == "Qwen2.5-VL")
    expected = []
    for squares in entered[0].view(-1, 4, entered[0].shape[-1])[order].split([len(unit) for unit in pooled]):
        deviation = torch.stack([column.std(correction=0) for column in squares.flatten(0, 1).unbind(dim=-1)])
        expected += [torch.stack([patch / deviation for patch in square]).mean(dim=0) for square in squares]
    assert len(pooled) == 3
    assert_close(ours, torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_a_dimension_without_deviation_is_nothing_to_compare_by():
    values = torch.tensor([[1.0, 0.1, 0.0], [3.0, 0.1, 0.0], [2.0, 0.1, 0.0]])
    assert standardised(values)[:, 1:].tolist() == [[0.0, 0.0]] * 3
    assert_close(standardised(values)[:, 0], values[:, 0] / (2 / 3) ** 0.5)


@by_family
@pytest.mark.parametrize("pruner", ["divprune_cen", "cdpruner_cen"])
def test_centred_pruners_compare_what_enters_a_merger_and_projected_features_elsewhere(family, pruner):
    """Alike in any batch, in either mode."""
    model, seen = model_of(family, pruning_ratio=0.5, pruner=pruner), []
    with observe_pruning(model, lambda prune, tokens: (seen.append(tokens.before_merger), prune())[1]):
        alone = [model(mode=Mode.FAST, **batch(family, [count], seed=seed)).loss for seed, count in enumerate(MIXED)]
        batched = model(mode=Mode.FAST, **batch(family, MIXED, "left")).loss
    assert_close(batched, torch.stack(alone).mean(), atol=1e-4, rtol=1e-4)
    assert {values is not None for values in seen} == {family in MERGERS}
    model(mode=Mode.SLOW, **batch(family, [1])).loss.backward()


def test_what_cannot_be_trained_is_refused_with_the_reason():
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28, "patch_size": 7}
    blip = Blip2ForConditionalGeneration(
        Blip2Config(
            vision_config=vision | {"intermediate_size": 32},
            qformer_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 9},
            text_config={"model_type": "opt", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1}
            | {"num_attention_heads": 4, "ffn_dim": 32, "word_embed_proj_dim": 32},
        )
    )
    with pytest.raises(ValueError, match="Blip2ForConditionalGeneration can't be trained on pruned tokens, since its"):
        DualSpeedModel(blip, DualSpeedConfig())
    pixtral = next(family for family in FAMILIES if family.name == "Mistral 3")
    with pytest.raises(ValueError, match=r"'fastervlm' looks at the vision tower's cls_attention.*tome"):
        model_of(pixtral, pruner="fastervlm")
    for pruner, field in (("scope", "cls_attention, pre_projection"), ("mmtok", "pre_projection")):
        others = "cdpruner, cdpruner_cen, divprune, divprune_cen, otprune, random, spatial_pool, tome, uniform"
        with pytest.raises(ValueError, match=f"'{pruner}' looks at the vision tower's {field}, which.*: {others}$"):
            model_of(pixtral, pruner=pruner)
    with pytest.raises(ValueError, match="prune_budget 'tile' is for models that cut images into tiles"):
        model_of(pixtral, prune_budget="tile")
    with pytest.raises(TypeError, match="unknown input image_grid"):
        model_of(FAMILIES[0])(**batch(FAMILIES[0], [1]), image_grid_thw=torch.ones(1, 3))


@pytest.mark.skipif(is_torchvision_available(), reason="the table says what can't be built without torchvision")
def test_docs_list_the_families():
    """UPDATE_README=1 writes the table that this run found."""
    lines = ["| family | class | pruned by | methods | to train |", "|---|---|---|---|---|"]
    lines += [line_of(family) for family in FAMILIES]
    page = REPOSITORY / "docs" / "families.md"
    before, old, after = re.split(
        r"(?<=<!-- families:start -->\n)(.*?)(?=\n<!-- families:end -->)", page.read_text(), flags=re.DOTALL
    )
    if os.environ.get("UPDATE_README"):
        page.write_text(before + "\n".join(lines) + after)
    assert old.splitlines() == lines


def line_of(family: Family) -> str:
    """Row of the table, found by trying every pruner."""
    vlm = family.build()
    images = image_side(batch(family, [1]))
    units = encode_images(vlm, image_inputs(vlm, images)).features
    methods = [name for name in PRUNERS if accepts(vlm, name)]
    feature_based = [name for name in PRUNERS if not set(PRUNERS[name].needs) & set(CAPTURED_FIELDS)]
    assert methods in (list(PRUNERS), feature_based)
    return " | ".join(
        [
            f"| {family.name}",
            f"`{type(vlm).__name__}`",
            "image" if len(units) == 1 else "tile",
            "all" if methods == list(PRUNERS) else "feature-based",
            f"{'needs torchvision' if processor_needs_torchvision(vlm.config.model_type) else ''} |",
        ]
    )


def accepts(vlm, pruner: str) -> bool:
    try:
        DualSpeedModel(vlm, DualSpeedConfig(pruner=pruner))
    except ValueError:
        return False
    return True
