"""Host-device syncs: each waits for all launched kernels, so a micro-batch may have few, whatever is in it.

Counted on the stand-in of tests/support/stand_in.py, for batches from the collator. Ours are those whose innermost line
outside torch is in `dualspeed/`; docs/speed.md lists the others.
"""

import os
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import concatenate, send_to_device, slice_tensors
from torch.utils.data import DataLoader
from transformers import CLIPConfig, CLIPModel

from dualspeed import DualSpeedConfig, DualSpeedModel, Mode
from dualspeed.data.collator import ConversationCollator
from dualspeed.errors import SampleError
from dualspeed.method.objective import Objective
from dualspeed.method.vlm.families import CAPTURED_FIELDS, family_of
from dualspeed.pruners import PRUNERS
from dualspeed.pruners.selection import prefix_mask
from dualspeed.training.micro_batches import micro_batches
from dualspeed.training.token_batches import read_rows
from measurements.random_tokens import random_tokens
from tests.support import tiny
from tests.support.families import FAMILIES, IMAGE, Family, batch
from tests.support.paths import REPOSITORY
from tests.support.prepared import PreparedProcessor, collated
from tests.support.stand_in import NAME, Syncs, host_syncs


def reads_tower(pruner: str) -> bool:
    """True if a pruner reads what is captured inside the vision tower."""
    return bool({*CAPTURED_FIELDS, "before_merger"} & {*PRUNERS[pruner].needs, *PRUNERS[pruner].optional})


by_family = pytest.mark.parametrize("family", FAMILIES, ids=[family.name for family in FAMILIES])
by_mode = pytest.mark.parametrize("mode", Mode)
LLAVAS = pytest.mark.parametrize(
    "family",
    [pytest.param(FAMILIES[0], marks=pytest.mark.slow), FAMILIES[1]],
    ids=["llava", "llava_next"],
)
QWENS = [family for family in FAMILIES if family.token_types == "mm_token_type_ids"]
by_qwen = pytest.mark.parametrize("family", QWENS, ids=[family.name for family in QWENS])
SMALL, LARGE = (1, 2), (2, 0, 1, 3, 1, 1)
AT_MOST = 2
OF_TOWER = sorted(name for name in PRUNERS if reads_tower(name))


def model_on_device(family, **settings) -> DualSpeedModel:
    return DualSpeedModel(family.build(), DualSpeedConfig(pruning_ratio=0.9, **settings)).to(NAME)


def syncs_of(call: Callable[[], object]) -> Syncs:
    with host_syncs() as syncs:
        call()
    return syncs


def syncs_of_step(model: DualSpeedModel, inputs: dict, mode: Mode) -> Syncs:
    """Waits of a micro-batch, forward and backward, after its batch has arrived."""
    inputs = {name: values for name, values in send_to_device(dict(inputs), NAME).items() if name != "num_images"}
    assert inputs["input_ids"].device.type == NAME
    return syncs_of(lambda: model(mode=mode, **inputs).loss.backward())


@cache
def syncs_of_family(name: str, mode: Mode, num_images: tuple[int, ...], pruner: str = "divprune") -> Syncs:
    """Waits of a micro-batch of a family."""
    family = next(family for family in FAMILIES if family.name == name)
    model = model_on_device(family, pruner=pruner)
    return syncs_of_step(model, collated(family, model, list(num_images)), mode)


def check_few(syncs: Syncs) -> None:
    """At most two waits are ours, and no copy to the device that the host would wait for."""
    assert len(syncs) > 0  # transformers has some in every forward pass
    assert len(syncs.ours()) <= AT_MOST, syncs.ours()
    assert not [str(upload) for upload in syncs.uploads if upload.is_ours]


@by_family
@by_mode
def test_every_family_waits_little_however_many_samples_and_images(family, mode):
    few, many = (syncs_of_family(family.name, mode, num_images) for num_images in (SMALL, LARGE))
    check_few(few)
    check_few(many)
    assert len(few.ours()) == len(many.ours())
    assert len(few) == len(many)


@LLAVAS
@pytest.mark.parametrize("pruner", PRUNERS)
def test_every_pruner_waits_little(family, pruner):
    """Whatever the pruner needs of tower, projector and text."""
    model = model_on_device(family, pruner=pruner)
    check_few(syncs_of_step(model, collated(family, model, LARGE), Mode.FAST))


@by_qwen
@pytest.mark.parametrize(
    "pruner", [pytest.param(name, marks=() if name == "visionzip" else pytest.mark.slow) for name in OF_TOWER]
)
def test_reading_the_tower_of_a_qwen_waits_once_more_at_most(family, pruner):
    """For the lengths of the parts that attend to themselves, where a method reads attention; else nowhere."""
    few, many = (syncs_of_family(family.name, Mode.FAST, images, pruner) for images in (SMALL, LARGE))
    plain = syncs_of_family(family.name, Mode.FAST, LARGE)
    check_few(many)
    assert [line.split(":")[0] for line in many.ours()] == [
        *(line.split(":")[0] for line in plain.ours()),
        *(["dualspeed/method/vlm/square_towers.py"] if "cls_attention" in PRUNERS[pruner].needs else []),
    ]
    assert many.others() == plain.others()
    assert (few.ours(), len(few)) == (many.ours(), len(many))


@pytest.mark.parametrize("pruner", ["divprune", "random", "vispruner"])
@by_mode
def test_budgets_of_tiles_wait_little(pruner, mode):
    model = model_on_device(FAMILIES[1], pruner=pruner, prune_budget="tile")
    check_few(syncs_of_step(model, collated(FAMILIES[1], model, LARGE), mode))


@pytest.mark.parametrize("family", [FAMILIES[8], *QWENS[:1]], ids=["Idefics3", "Qwen2-VL"])
def test_seeds_of_images_wait_little(family):
    """Tiles of padding, and images of different sizes, are told apart without waiting."""
    model = model_on_device(family, pruner="random")
    check_few(syncs_of_step(model, collated(family, model, LARGE), Mode.FAST))


@by_mode
def test_left_padding_waits_little(mode):
    model = model_on_device(FAMILIES[0])
    check_few(syncs_of_step(model, collated(FAMILIES[0], model, LARGE, "left"), mode))


@by_family
def test_a_batch_without_images_beside_other_ranks_waits_little(family, monkeypatch):
    monkeypatch.setattr("dualspeed.method.model.has_other_ranks", lambda: True)
    model = model_on_device(family)
    check_few(syncs_of_step(model, collated(family, model, [0, 0]), Mode.SLOW))


def test_relevance_by_clip_waits_little(tmp_path):
    vision = tiny.configs()["vision_config"].to_dict()
    text = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "eos_token_id": 2}
    text |= {"intermediate_size": 32, "max_position_embeddings": 6, "bos_token_id": 1}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    model = model_on_device(FAMILIES[0], pruner="cdpruner", relevance_clip=str(tmp_path))
    model.clip_relevance.clip.to(NAME)
    questions = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [5, 6, -1, -1, -1, -1, -1], [-1] * 7])
    inputs = collated(FAMILIES[0], model, [1, 2, 1]) | {"question_ids": questions}
    check_few(syncs_of_step(model, inputs, Mode.FAST))


@pytest.mark.parametrize("pruner", PRUNERS)
def test_pruners_never_wait_for_images_whose_sizes_the_host_knows(pruner, monkeypatch):
    """Without the sizes, those whose loops depend on them wait once for the mask's."""
    monkeypatch.setattr("dualspeed.pruners.coverage.LAZY_FROM", 1)
    sizes, num_keep = torch.tensor([80, 33, 50]), torch.tensor([8, 5, 49])
    tokens = random_tokens(3, 80, 16, NAME)
    tokens = replace(tokens, mask=prefix_mask(sizes, tokens.cls_attention), num_tokens=sizes)
    known, unknown = (
        syncs_of(lambda given=given: PRUNERS[pruner](given, num_keep))
        for given in (tokens, replace(tokens, num_tokens=None))
    )
    assert not known
    assert not known.uploads
    assert len(unknown) == (pruner in ("tome", "vispruner"))


@by_qwen
@by_mode
def test_a_batch_without_positions_has_the_same_loss_and_more_waits(family, mode):
    model = model_on_device(family)
    inputs = collated(family, model, LARGE)
    given = {name: values for name, values in inputs.items() if name not in ("positions_3d", "num_images")}
    with_positions, without = syncs_of_step(model, inputs, mode), syncs_of_step(model, given, mode)
    assert len(without) > len(with_positions) + 10
    check_few(without)
    model.to("cpu")
    assert torch.equal(
        model(mode=mode, positions_3d=inputs["positions_3d"], **given).loss, model(mode=mode, **given).loss
    )


@pytest.mark.parametrize("family", [FAMILIES[0], *QWENS[-1:]], ids=["llava", "qwen3_vl"])
@by_mode
def test_packing_waits_no_more_than_padding(family, mode):
    """By a mask, which transformers makes of the positions; flash attention would read the lengths."""
    model = model_on_device(family)
    inputs = collated(family, model, LARGE)
    padded, packed = (
        syncs_of_step(model, {**inputs, "objective": Objective(packs=packs)}, mode).ours() for packs in (False, True)
    )
    assert padded == packed and len(packed) <= AT_MOST


def test_a_division_by_tokens_waits_once():
    model = model_on_device(FAMILIES[0])
    inputs = send_to_device(dict(collated(FAMILIES[0], model, LARGE)), NAME)
    num_images = inputs.pop("num_images")
    syncs = syncs_of(lambda: read_rows(inputs, num_images, model.config.image_token_id, model.dualspeed))
    assert len(syncs.ours()) == 1


@by_family
def test_batches_of_the_collator_are_the_processors(family):
    """With token types padded along."""
    model = DualSpeedModel(family.build(), DualSpeedConfig())
    for padding_side in ("right", "left"):
        made, expected = collated(family, model, LARGE, padding_side), batch(family, list(LARGE), padding_side)
        assert made.keys() - {"positions_3d", "num_images"} == expected.keys()
        assert ("positions_3d" in made) == (family in QWENS)
        for name, values in expected.items():
            assert torch.equal(made[name], values.to(made[name].dtype)), name


@by_qwen
def test_positions_survive_workers_dispatch_and_splitting(family):
    model = DualSpeedModel(family.build(), DualSpeedConfig())
    whole = collated(family, model, [1, 2, 1, 2])
    positions, num_images = whole["positions_3d"], whole["num_images"]
    assert positions.shape == (4, 3, whole["input_ids"].shape[1])
    assert positions[:, 1].max() > 0 and not torch.equal(positions[:, 1], positions[:, 2])

    # A worker gets the collator pickled where processes are spawned, without the model's weights.
    processor, carried = PreparedProcessor(family, [1, 2, 1, 2]), pickle.dumps(model.positions())
    assert len(carried) < 10_000
    collator = ConversationCollator(processor, positions=pickle.loads(carried))
    rows = [{"id": str(index), "messages": [], "images": []} for index in range(4)]
    loader = DataLoader(rows, batch_size=4, collate_fn=collator, num_workers=1)
    assert torch.equal(next(iter(loader))["positions_3d"], positions)

    # accelerate sends tensors to the device, and with dispatch_batches slices and joins them by rows.
    tensors = {name: values for name, values in whole.items() if name != "num_images"}
    loader = DataLoader(rows, batch_size=4, collate_fn=collator)
    dispatched = next(iter(prepare_data_loader(loader, torch.device("cpu"), put_on_device=True, dispatch_batches=True)))
    assert torch.equal(dispatched["positions_3d"], positions)
    halves = [slice_tensors(tensors, slice(start, start + 2)) for start in (0, 2)]
    assert torch.equal(concatenate(halves)["positions_3d"], positions)

    parts = micro_batches(dict(whole), num_images, 1)
    assert torch.equal(torch.cat([part["positions_3d"] for part in parts]), positions)
    losses = [model(mode=Mode.FAST, **{k: v for k, v in part.items() if k != "num_images"}).loss for part in parts]
    assert torch.stack(losses).mean().item() == pytest.approx(model(mode=Mode.FAST, **tensors).loss.item(), abs=1e-5)


@by_qwen
def test_splitting_a_slow_batch_waits_once(family):
    model = DualSpeedModel(family.build(), DualSpeedConfig())
    inputs = collated(family, model, LARGE)
    num_images = inputs.pop("num_images")
    inputs = send_to_device(dict(inputs), NAME)
    assert len(syncs_of(lambda: micro_batches(inputs, num_images, 2)).ours()) == 1


def test_labels_that_pruning_removes_are_refused():
    model = DualSpeedModel(FAMILIES[0].build(), DualSpeedConfig())
    inputs = batch(FAMILIES[0], [1, 1])
    inputs["labels"][inputs["input_ids"] == IMAGE] = IMAGE
    with pytest.raises(SampleError, match=r"labels supervise 42 tokens of the batch, but \d+ after pruning"):
        model(mode=Mode.FAST, **inputs)


def test_an_images_tokens_that_reach_into_the_next_row_are_refused():
    model = DualSpeedModel(FAMILIES[0].build(), DualSpeedConfig())
    inputs = batch(FAMILIES[0], [1, 1])
    places = (inputs["input_ids"] == IMAGE).nonzero()
    inputs["input_ids"][tuple(places[0])] = 9
    inputs["input_ids"][1, -1] = IMAGE
    with pytest.raises(SampleError, match="sample 0 of the batch has 15 image placeholders"):
        model(mode=Mode.FAST, **inputs)


def waits_with_attention(family: Family) -> int | str:
    """Our waits with FasterVLM, which reads the tower's attention; "-" where it can't."""
    if not family_of(family.build()).has_readable_tower:
        return "-"
    return len(syncs_of_family(family.name, Mode.FAST, LARGE, "fastervlm").ours())


def test_docs_list_the_waits():
    """UPDATE_README=1 writes the table that this run found."""
    lines = [
        "| family | ours | ours, FasterVLM | transformers, fast | transformers, slow |",
        "|---|---:|---:|---:|---:|",
    ]
    for family in FAMILIES:
        found = [syncs_of_family(family.name, mode, LARGE) for mode in Mode]
        assert len({len(syncs.ours()) for syncs in found}) == 1
        counts = [len(found[0].ours()), waits_with_attention(family), *(len(syncs.others()) for syncs in found)]
        lines.append(" | ".join([f"| {family.name}", *map(str, counts)]) + " |")
    page = REPOSITORY / "docs" / "speed.md"
    before, old, after = re.split(
        r"(?<=<!-- syncs:start -->\n)(.*?)(?=\n<!-- syncs:end -->)", page.read_text(), flags=re.DOTALL
    )
    if os.environ.get("UPDATE_README"):
        page.write_text(before + "\n".join(lines) + after)
    assert old.splitlines() == lines
