"""PixelPrune: which squares of patches stay, and the tower, the sequence and the training on those that do."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    AttentionInterface,
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    TrainingArguments,
)
from transformers.vision_utils import get_vision_window_index

from dualspeed import DualSpeedConfig, DualSpeedModel, DualSpeedTrainer, Mode
from dualspeed.errors import ConfigError, ModelError
from dualspeed.method.fast_mode import encode_batch, observe_pruning, prune_batch
from dualspeed.method.losses import distillation
from dualspeed.method.sequences import Sequences, with_counts
from dualspeed.method.vlm.families import family_of
from dualspeed.method.vlm.inputs import image_inputs, token_inputs
from dualspeed.method.vlm.pixel_pruning import kept_squares, neighbours
from dualspeed.method.vlm.vision import encode_images
from dualspeed.pruners import num_tokens_to_keep
from dualspeed.training.trainable import set_trainable
from tests.support.families import FAMILIES, IMAGE, QWEN_TEXT, QWEN_TOKENS, Family, Images, batch, built, encode_qwen
from tests.support.prepared import collated
from tests.support.stand_in import NAME, host_syncs


def of_larger_pictures(family: Family) -> Family:
    """A family whose pictures have twice the side, some 20 squares."""

    def encode(samples: Images):
        return family.encode(
            [[image.resize((2 * image.width, 2 * image.height)) for image in images] for images in samples]
        )

    return replace(family, encode=encode)


def qwen3_5() -> PreTrainedModel:
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 8}
    vision |= {"out_hidden_size": 32, "num_position_embeddings": 64}
    text = QWEN_TEXT | {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
    text |= {"linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"]}
    config = Qwen3_5Config(vision_config=vision, text_config=text, **QWEN_TOKENS)
    return built(Qwen3_5ForConditionalGeneration, config)


QWENS = [
    *(family for family in FAMILIES if family.name in ("Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL")),
    Family("Qwen3.5", qwen3_5, encode_qwen(8), "mm_token_type_ids"),
]
OTHERS = [family for family in FAMILIES if not family.name.startswith("Qwen")]
QWENS = [of_larger_pictures(family) for family in QWENS]
by_qwen = pytest.mark.parametrize("family", QWENS, ids=[family.name for family in QWENS])
CHOICES = {0: 2, 0.5: 4, 1.0: 7}
"""Tolerance -> largest of the numbers, in halves, that make random pictures."""


def kept_of_picture(rows: list[list[float]], tolerance: float = 0) -> list[list[int]]:
    """1 for the squares of a picture that stay; each square is one number."""
    pixels = torch.tensor(rows, dtype=torch.float32)
    around = neighbours([tuple(pixels.shape)], pixels)
    return kept_squares(pixels.flatten()[:, None], around, tolerance).view(pixels.shape).int().tolist()


def literal(picture: Tensor, tolerance: float) -> Tensor:
    """The published rule, square by square: (rows, columns, V) -> (rows, columns) bool."""
    decoded, kept = picture.clone(), torch.zeros(picture.shape[:2], dtype=torch.bool)

    def similar(one: Tensor, other: Tensor) -> bool:
        return bool((one - other).abs().max() <= tolerance)

    for row in range(picture.shape[0]):
        for column in range(picture.shape[1]):
            if row == column == 0:
                kept[0, 0] = True
                continue
            if row == 0 or column == 0:
                predicted = decoded[row, column - 1] if row == 0 else decoded[row - 1, column]
            else:
                a, b, c = decoded[row, column - 1], decoded[row - 1, column], decoded[row - 1, column - 1]
                predicted = b if similar(c, a) and not similar(c, b) else a
            if similar(picture[row, column], predicted):
                decoded[row, column] = predicted
            else:
                kept[row, column] = True
    return kept


def even_batch(family: Family, num_images: list[int], padding_side: str = "right", seed: int = 0) -> dict[str, Tensor]:
    """A batch of pictures whose lower half is even, but for its last square."""
    inputs = batch(family, num_images, padding_side, seed)
    per_image = inputs["pixel_values"].split(inputs["image_grid_thw"].prod(dim=1).tolist())
    for patches in per_image:
        patches[len(patches) // 8 * 4 : -4] = 0.25
    return inputs


def image_side(vlm: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    taken = ("input_ids", "attention_mask", "labels")
    return image_inputs(vlm, {name: values for name, values in inputs.items() if name not in taken})


def model_of(family: Family, **settings) -> DualSpeedModel:
    torch.manual_seed(0)
    return DualSpeedModel(family.build(), DualSpeedConfig(**{"pixel_pruning": 0, "pruning_ratio": 0.5} | settings))


def whole(model: DualSpeedModel, inputs: dict[str, Tensor]) -> tuple[Sequences, dict[str, Tensor]]:
    """The sequences with all tokens, each token's place as a further input, and the inputs of the tower."""
    pixels = image_side(model.vlm, inputs)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    extra = token_inputs(model.vlm, ids, mask, inputs, pixels)
    extra = extra | {"places": torch.arange(ids.numel()).view(ids.shape)}
    return with_counts(Sequences(ids, mask, inputs["labels"], extra), IMAGE, pixels)


def test_a_rectangle_is_kept_by_three_of_its_corners():
    assert kept_of_picture([[7, 7, 7, 7, 7], [7, 3, 3, 3, 7], [7, 3, 3, 3, 7], [7, 7, 7, 7, 7]]) == [
        [1, 0, 0, 0, 0],
        [0, 1, 0, 0, 1],
        [0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0],
    ]
    assert kept_of_picture([[7, 7, 3, 3]] * 3) == [[1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert kept_of_picture([[7], [7], [3], [3]]) == [[1], [0], [1], [0]]


def test_differences_within_the_tolerance_never_add_up():
    """Each square is compared with the one that stands for its neighbour."""
    assert kept_of_picture([[0, 1, 2, 3, 4, 5]], tolerance=1.5) == [[1, 0, 1, 0, 1, 0]]
    assert kept_of_picture([[0], [1], [2], [3], [4]], tolerance=2) == [[1], [0], [0], [1], [0]]
    assert kept_of_picture([[0, 0.5], [0.5, 1]], tolerance=1) == [[1, 0], [0, 0]]
    assert kept_of_picture([[0, 0.5], [0.5, 1.5]], tolerance=1) == [[1, 0], [0, 1]]


def test_a_square_differs_by_its_most_different_pixel():
    pixels = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, -1.5]])
    around = neighbours([(1, 3)], pixels)
    assert kept_squares(pixels, around, 1.0).tolist() == [True, False, True]
    assert kept_squares(pixels, around, 1.5).tolist() == [True, False, False]


@pytest.mark.parametrize("tolerance", CHOICES)
def test_pictures_of_a_batch_are_scanned_as_published(tolerance):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 1), (1, 7), (6, 1), (5, 8), (9, 4), (12, 12)] * 3
    pictures = [
        torch.randint(0, 1 + CHOICES[tolerance], (*shape, 1), generator=generator).expand(*shape, 2) * 0.5
        for shape in shapes
    ]
    pictures[3] = torch.randn(5, 8, 2, generator=generator) * 0.4
    squares = torch.cat([picture.flatten(0, 1) for picture in pictures])
    kept = kept_squares(squares, neighbours(shapes, squares), tolerance)
    expected = [literal(picture, tolerance) for picture in pictures]
    assert torch.equal(kept, torch.cat([of_picture.flatten() for of_picture in expected]))
    assert 0.1 < kept.float().mean() < 0.9
    if tolerance == 0:  # at once, and in turn
        assert torch.equal(kept, kept_squares(squares, neighbours(shapes, squares), 1e-9))


@by_qwen
def test_pictures_without_a_predicted_square_have_the_features_of_the_whole_tower(family):
    vlm = family.build()
    images = image_side(vlm, batch(family, [2, 1]))
    grids = images["image_grid_thw"].tolist()
    stock = encode_images(vlm, images, needs=("before_merger",))
    ours = encode_images(vlm, images, needs=("before_merger",), pixel_pruning=0, grids=grids)
    assert ours.squares.before == ours.squares.after == [len(features) for features in stock.features]
    assert torch.equal(ours.inputs["pixel_values"], images["pixel_values"])
    for one, other in zip(ours.all_features(), stock.all_features(), strict=True):
        assert torch.equal(one, other)
    assert ours.described.keys() == stock.described.keys()
    for name, values in stock.described.items():
        assert torch.equal(ours.described[name], values)


@contextmanager
def masked_patches(vlm: PreTrainedModel, is_kept: Tensor) -> Iterator[list[int]]:
    """Attention of the whole tower in which dropped patches are neither asked nor answered.

    Yields the number of patches of each call of the attention.
    """
    lengths: list[int] = []

    def attention(module, query, key, value, attention_mask, scaling, **settings):
        start = sum(lengths) % len(is_kept)
        lengths.append(key.shape[2])
        seen = is_kept[start : start + key.shape[2]]
        scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~(seen[:, None] & seen), -1e30)
        return (scores.softmax(dim=-1) @ value).transpose(1, 2), None

    AttentionInterface.register("masked_patches", attention)
    config = vlm.model.visual.config
    before, config._attn_implementation = config._attn_implementation, "masked_patches"
    try:
        yield lengths
    finally:
        config._attn_implementation = before


@by_qwen
def test_the_tower_on_half_of_the_squares_is_the_whole_one_that_never_looks_at_the_others(family, monkeypatch):
    """A whole window among those that are dropped; positions, windows and DeepStack are those of the whole picture."""
    vlm = family.build()
    images = image_side(vlm, batch(family, [2, 1]))
    grids, vision = images["image_grid_thw"], vlm.config.vision_config
    num_squares = len(images["pixel_values"]) // 4
    is_kept = torch.rand(num_squares, generator=torch.Generator().manual_seed(1)) < 0.5
    order = torch.arange(num_squares)
    if family.name == "Qwen2.5-VL":
        order, ends = get_vision_window_index(grids, 2, vision.window_size, vision.patch_size)
        window = int(ends[2] // 4), int(ends[3] // 4)
        is_kept[order[window[0] : window[1]]] = False
        assert len(ends) > 5
    is_kept[0] = True
    starts = torch.tensor([0, *(grids.prod(dim=1) // 4).cumsum(0)[:-1].tolist()])
    is_kept[starts] = True
    assert 0.3 < is_kept.float().mean() < 0.7

    with masked_patches(vlm, is_kept[order].repeat_interleave(4)) as lengths:
        stock = encode_images(vlm, images, needs=("before_merger",))
    assert sum(lengths) == vision.depth * 4 * num_squares
    monkeypatch.setattr("dualspeed.method.vlm.pixel_pruning.kept_squares", lambda *_: is_kept)
    ours = encode_images(vlm, images, needs=("before_merger",), pixel_pruning=0, grids=grids.tolist())

    assert ours.squares.after == [int(part.sum()) for part in is_kept.split(ours.squares.before)]
    assert len(ours.inputs["pixel_values"]) == 4 * is_kept.sum()
    expected = [torch.cat(stock.features), *stock.all_features()[len(stock.features) :]]
    found = [torch.cat(ours.features), *ours.all_features()[len(ours.features) :]]
    assert len(found) == len(expected) == (3 if family.name == "Qwen3-VL" else 1)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other[is_kept], atol=1e-5, rtol=1e-5)
    # The stock tower that looks at all of them has other features.
    monkeypatch.undo()
    unmasked = torch.cat(encode_images(vlm, images).features)
    assert (unmasked[is_kept] - found[0]).abs().max() > 1e-2


@by_qwen
@pytest.mark.parametrize("ratio", [0.5, 0.9, 0.0])
def test_fast_mode_keeps_the_share_of_all_tokens_among_those_that_remain(family, ratio):
    """Kept tokens keep their positions and deeper features; text stays."""
    model = model_of(family, pruning_ratio=ratio, num_virtual_tokens=2)
    inputs = even_batch(family, [2, 0, 1])
    full, pixels = whole(model, inputs)
    encoded = encode_batch(model, pixels, full.counts.grids)
    squares = encoded.squares
    assert sum(squares.after) < 0.8 * sum(squares.before)
    pruned, output = prune_batch(model, full, encoded, None)
    budgets = [num_tokens_to_keep(before, ratio) for before in squares.before]
    kept = [min(budget, after) for budget, after in zip(budgets, squares.after, strict=True)]
    assert [len(features) - 2 for features in output.pooler_output] == kept
    if ratio == 0:
        assert kept == squares.after

    is_token = pruned.attention_mask.bool()
    places = pruned.by_token["places"][is_token]
    placeholders = (full.input_ids == IMAGE).flatten().nonzero()[:, 0]
    entered = placeholders[squares.indices]
    of_images = places[pruned.input_ids[is_token] == IMAGE]
    assert set(of_images.tolist()) <= set(entered.tolist())
    text = ((full.input_ids != IMAGE) & full.attention_mask.bool()).flatten().nonzero()[:, 0]
    assert torch.equal(places[pruned.input_ids[is_token] != IMAGE], text)
    positions = full.by_token["position_ids"].flatten(1)[:, places]
    assert torch.equal(pruned.by_token["position_ids"][:, is_token], positions)
    # Behind two positions of the isolator, features are those of the squares at the tokens' places.
    for found, features in zip(
        [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])],
        [torch.cat(encoded.features), *encoded.all_features()[len(encoded.features) :]],
        strict=True,
    ):
        rest = torch.cat([unit[2:] for unit in found])
        is_isolator = torch.cat([torch.arange(len(unit)) < 2 for unit in found])
        among = torch.searchsorted(entered, of_images[~is_isolator])
        assert torch.equal(rest, features[among])


@by_qwen
def test_the_teacher_reads_what_fast_steps_read_and_the_student_everything(family):
    model = model_of(family)
    inputs = even_batch(family, [1, 2])
    slow, fast = (model(mode=mode, **inputs) for mode in (Mode.SLOW, Mode.FAST))
    unpruned = model_of(family, pixel_pruning=None)
    assert torch.equal(slow.ce_loss, unpruned(mode=Mode.SLOW, **inputs).ce_loss)
    assert not torch.equal(fast.logits, unpruned(mode=Mode.FAST, **inputs).logits)
    expected = distillation(slow.logits, fast.logits, 1.0, len(fast.logits))
    assert_close(slow.distillation_loss, expected, atol=1e-6, rtol=1e-5)


@by_qwen
@pytest.mark.parametrize("pruner", ["divprune", "random", "cdpruner", "mmtok", "divprune_cen", "tome"])
def test_batched_equals_alone_on_either_padding_side(family, pruner):
    if pruner == "mmtok" and not family_of(family.build()).has_readable_tower:
        pytest.skip("reads features before the projector")
    counts = [1, 0, 2, 1]
    model = model_of(family, pruner=pruner, pixel_pruning=0.01)
    alone = [
        model(mode=Mode.FAST, **(even_batch if count else batch)(family, [count], seed=seed)).loss
        for seed, count in enumerate(counts)
    ]
    for padding_side in ("right", "left"):
        batched = model(mode=Mode.FAST, **even_batch(family, counts, padding_side)).loss
        assert_close(batched, torch.stack(alone).mean(), atol=1e-4, rtol=1e-4)


@by_qwen
def test_it_trains(family):
    model = model_of(family, pruning_ratio=0.9)
    set_trainable(model, "finetune")
    inputs = even_batch(family, [1, 0, 2])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for step in range(20):
        loss = model(mode=Mode.SLOW if step == 10 else Mode.FAST, **inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_resumed_equals_uninterrupted(tmp_path):
    family = QWENS[2]
    rows = Dataset.from_list([{"seed": seed} for seed in range(16)])

    def train(folder, num_steps: int, **settings) -> list[float]:
        torch.manual_seed(0)
        trainer = DualSpeedTrainer(
            model=family.build(),
            args=TrainingArguments(
                output_dir=str(folder), max_steps=num_steps, save_steps=3, per_device_train_batch_size=2,
                learning_rate=1e-3, lr_scheduler_type="constant", logging_steps=1, use_cpu=True, disable_tqdm=True,
                seed=3,
            ),
            dualspeed=DualSpeedConfig(slow_mode_ratio=0.4, pruning_ratio=0.5, pixel_pruning=0, pruner="random"),
            train_dataset=rows,
            data_collator=lambda batch_of: even_batch(family, [1] * len(batch_of), seed=batch_of[0]["seed"]),
        )  # fmt: skip
        trainer.train(**settings)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    whole_run = train(tmp_path / "whole", 6)
    train(tmp_path / "parts", 3)
    resumed = train(tmp_path / "parts", 6, resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    assert resumed == whole_run
    assert len(whole_run) == 6


@by_qwen
def test_generation_in_fast_mode_continues_what_fast_mode_reads(family):
    model = model_of(family, pruning_ratio=0.25).eval()
    inputs = even_batch(family, [1, 2], "left")
    # The last supervised token is the first that generation has to find.
    labels = inputs.pop("labels")
    labels[:, :-1] = -100
    expected = model(mode=Mode.FAST, labels=labels, **inputs).logits.argmax(dim=-1)
    cut = {name: values[:, :-1] if values.shape == labels.shape else values for name, values in inputs.items()}
    sizes: list[list[int]] = []
    with observe_pruning(model, lambda prune, tokens: sizes.append(tokens.num_tokens.tolist()) or prune()):
        answers = model.generate(mode=Mode.FAST, max_new_tokens=1, do_sample=False, **cut)
    assert torch.equal(answers[:, -1], expected)
    encoded = encode_batch(model, image_side(model.vlm, inputs), inputs["image_grid_thw"].tolist())
    assert sizes == [encoded.squares.after] != [encoded.squares.before]


@by_qwen
@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("tolerance", [0, 0.01])
def test_it_waits_once_more_for_the_device(family, mode, tolerance):
    model = model_of(family, pixel_pruning=tolerance).to(NAME)
    inputs = collated(family, model, [2, 0, 1, 3])
    inputs = {name: values.to(NAME) for name, values in inputs.items() if name != "num_images"}
    with host_syncs() as syncs:
        model(mode=mode, **inputs).loss.backward()
    assert len(syncs.ours()) == 2, syncs.ours()
    assert not [str(upload) for upload in syncs.uploads if upload.is_ours]


@by_qwen
@pytest.mark.parametrize("mode", list(Mode))
def test_a_batch_without_images_of_one_of_two_ranks_calls_the_same_modules(family, mode, monkeypatch):
    monkeypatch.setattr("dualspeed.method.model.has_other_ranks", lambda: True)
    model, called = model_of(family, pruner="cdpruner"), []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda module, args, name=name: called.append(name))
    orders = []
    for inputs in (even_batch(family, [1, 2]), batch(family, [0, 0])):
        model(mode=mode, **inputs).loss.backward()
        orders.append(called.copy())
        called.clear()
    assert orders[0] == orders[1]
    num_encodings = 2 if mode is Mode.SLOW else 1
    assert orders[0].count(f"vlm.{family_of(model.vlm).tower}") == num_encodings


@pytest.mark.parametrize("family", OTHERS, ids=lambda family: family.name)
def test_towers_that_take_whole_images_refuse_it(family):
    with pytest.raises(
        ModelError, match=r"pixel_pruning 0 .* takes whole images; valid: null, or a model of qwen2_5_vl"
    ):
        DualSpeedModel(family.build(), DualSpeedConfig(pixel_pruning=0))


@pytest.mark.parametrize("tolerance", [-0.1, float("nan"), float("inf")])
def test_tolerances_that_are_none_are_refused(tolerance):
    with pytest.raises(ConfigError, match=r"pixel_pruning: .* is out of range; valid: 0 or more, or null"):
        DualSpeedConfig(pixel_pruning=tolerance)
