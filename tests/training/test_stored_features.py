"""Kept features of a frozen tower: each image is encoded once, and trainings are those without."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainingArguments
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from dualspeed import DualSpeedConfig, DualSpeedModel, DualSpeedTrainer
from dualspeed.data.image_digest import image_digest
from dualspeed.errors import ConfigError, FeatureCacheError, ModelError
from dualspeed.training import stored_features
from dualspeed.training.feature_folder import MARK, file_of
from tests.support import families, tiny
from tests.support.tiny_chat import tiny_chat

MIXED = DualSpeedConfig(slow_mode_ratio=0.5, mode_schedule="stratified", pruning_ratio=0.7)
NUM_IMAGES = 8


def pictures(number: int = NUM_IMAGES) -> list[Image.Image]:
    """Noise of three sizes."""
    noise = np.random.default_rng(0)
    sizes = [(28, (28, 60, 90)[index % 3], 3) for index in range(number)]
    return [Image.fromarray(noise.integers(0, 255, size, dtype=np.uint8)) for size in sizes]


def rows_of(images: list) -> list[dict]:
    """As many rows as images: with one, two, none, one of them in turn, so that some are in several rows."""
    rows = []
    for index in range(len(images)):
        of_row = [images[index], images[index - 1]][: (1, 2, 0, 1)[index % 4]]
        user = [{"type": "image"}] * len(of_row) + [{"type": "text", "text": "is there a red digit ?"}]
        answer = [{"type": "text", "text": "yes" if index % 3 else "no"}]
        messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages, "images": of_row})
    return rows


def shown(rows: list[dict]) -> int:
    """Number of distinct images in rows."""
    return len({image_digest(image) for row in rows for image in row["images"]})


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "llava"
    tiny.make_llava(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    """Paths of the pictures."""
    folder = tmp_path_factory.mktemp("files")
    paths = [folder / f"{index}.png" for index in range(NUM_IMAGES)]
    for path, picture in zip(paths, pictures(), strict=True):
        picture.save(path)
    return list(map(str, paths))


def trainer(model, out, rows, cache=None, dualspeed=MIXED, **given) -> DualSpeedTrainer:
    names = set(TrainingArguments.__dataclass_fields__)
    arguments = {name: given.pop(name) for name in list(given) if name in names}
    arguments = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "seed": 1} | arguments
    args = TrainingArguments(str(out), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", **arguments)
    cache = None if cache is None else str(cache)
    return DualSpeedTrainer(model, args, train_dataset=rows, dualspeed=dualspeed, cache_features=cache, **given)


def losses(made: DualSpeedTrainer) -> list[float]:
    made.train()
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


@pytest.fixture
def passes(monkeypatch) -> Counter:
    """Tiles that passed each layer of a CLIP tower, by layer."""
    found: Counter = Counter()
    run = CLIPEncoderLayer.forward

    def forward(self, hidden_states, *args, **kwargs):
        found["tiles"] += len(hidden_states)
        return run(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(CLIPEncoderLayer, "forward", forward)
    return found


SWEEP = {
    "Baseline": DualSpeedConfig(slow_mode_ratio=1.0, distillation_weight=0.0),
    "NaivePrune": DualSpeedConfig(slow_mode_ratio=0.0, num_virtual_tokens=0),
    "DualSpeed": MIXED,
    "DualSpeed by attention": DualSpeedConfig(pruner="fastervlm", slow_mode_ratio=0.5, pruning_ratio=0.5),
}


def test_what_killed_writers_left_is_removed_by_the_next_training(base, files, tmp_path):
    losses(trainer(base, tmp_path, rows_of(files), tmp_path / "cache", max_steps=1))
    whole = next((tmp_path / "cache").glob("*/??/*"))
    begun = whole.with_name(f".{whole.name}.begun")
    begun.write_bytes(b"half")
    losses(trainer(base, tmp_path, rows_of(files), tmp_path / "cache", max_steps=1))
    assert whole.exists() and not begun.exists()


def test_a_sweep_encodes_each_image_once_and_trains_as_without(base, files, tmp_path, passes):
    """Four rows of two epochs; a run that is done again reads all, and is the same bit for bit."""
    rows, layers = rows_of(files), 2  # of three, the model selects the second one's output
    plain = {name: losses(trainer(base, tmp_path, rows, dualspeed=config)) for name, config in SWEEP.items()}
    without = passes["tiles"]
    passes.clear()
    cached = {name: losses(trainer(base, tmp_path, rows, tmp_path / "cache", config)) for name, config in SWEEP.items()}
    # Beside the images: a blank one when each model is made, and two passes of the check in the first row.
    assert passes["tiles"] == layers * (shown(rows) + len(SWEEP) + 2) < without / 3
    for name in ("DualSpeed", "DualSpeed by attention"):
        assert losses(trainer(base, tmp_path, rows, tmp_path / "cache", SWEEP[name])) == cached[name]
    assert passes["tiles"] == layers * (shown(rows) + len(SWEEP) + 2 + 2)
    for name in SWEEP:
        assert cached[name] == pytest.approx(plain[name], rel=1e-5)
    assert len(list((tmp_path / "cache").glob("*/??/*"))) == shown(rows) == len({*map(image_digest, files)}) - 2


@pytest.mark.parametrize(
    "family",
    ["qwen3_vl"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("llava_next", "qwen2_5_vl", "gemma3", "idefics3")],
)
def test_families_train_as_without(family, tmp_path):
    """Tiles of any number, patches of any grid, windows, DeepStack; images in the rows themselves."""
    checkpoint, rows = tiny_chat(family, tmp_path / "base"), rows_of(pictures())
    config = DualSpeedConfig(pruner="prumerge", slow_mode_ratio=0.5, mode_schedule="stratified", pruning_ratio=0.5)
    plain, cached, again = (
        losses(trainer(checkpoint, tmp_path, rows, cache, config)) for cache in (None, tmp_path / "c", tmp_path / "c")
    )
    assert cached == pytest.approx(plain, rel=1e-5)
    assert again == cached
    assert len(list((tmp_path / "c").glob("*/??/*"))) == shown(rows)


def test_steps_read_what_was_kept(base, files, tmp_path):
    """Outputs that are changed on the disk change the losses."""
    rows, cache = rows_of(files), tmp_path / "cache"
    before = losses(trainer(base, tmp_path, rows, cache))
    for file in cache.glob("*/??/*"):
        states = stored_features.read_states(file.parents[1], file.name)
        stored_features.write_states(file.parents[1], file.name, {name: -values for name, values in states.items()})
    assert losses(trainer(base, tmp_path, rows, cache)) != pytest.approx(before, rel=1e-5)


@pytest.mark.slow
def test_workers_split_steps_and_validations_read(base, files, tmp_path, passes):
    """Slow steps in parts, some of which have no image; two workers; validations in both modes."""
    given = {"eval_strategy": "steps", "eval_steps": 2, "eval_mode": "both", "slow_batch_size": 1}
    given |= {"eval_dataset": rows_of(files)[:3], "dataloader_num_workers": 2, "max_steps": 2}
    logs = []
    for cache in (None, tmp_path / "cache"):
        passes.clear()
        made = trainer(base, tmp_path, rows_of(files)[3:], cache, **given)
        made.train()
        logs.append(made.state.log_history)
    assert passes["tiles"] == 2 * (shown(rows_of(files)) + 3)
    for one, other in zip(*logs, strict=True):
        found = {name: value for name, value in one.items() if name.endswith("loss")}
        assert {name: other[name] for name in found} == pytest.approx(found, rel=1e-5)
    made.evaluate(rows_of(files)[:2])
    assert passes["tiles"] == 2 * (shown(rows_of(files)) + 3)
    made.evaluate(rows_of([*files[1:], files[0]])[:2])
    assert passes["tiles"] == 2 * (shown(rows_of(files)) + 3 + 1)  # one of these images is new


def test_bfloat16_towers_are_kept_in_bfloat16(base, files, tmp_path):
    made = trainer(base, tmp_path, rows_of(files), tmp_path / "cache", bf16=True, max_steps=1)
    made.inner_model.vlm.model.vision_tower.to(torch.bfloat16)
    made.train()
    (file, *_) = (tmp_path / "cache").glob("*/??/*")
    states = stored_features.read_states(file.parents[1], file.name)
    assert {name: values.dtype for name, values in states.items()} == {
        "layer_1": torch.bfloat16,
        "cls_attention": torch.float32,
    }


def addresses(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir() if path.name != MARK}


def test_another_model_or_processor_has_another_address(base, files, tmp_path, passes):
    cache, rows = tmp_path / "cache", rows_of(files)[:2]

    def run(model, **given) -> int:
        before = addresses(cache) if cache.exists() else set()
        passes.clear()
        trainer(model, tmp_path, rows, cache, **given).get_train_dataloader()
        return len(addresses(cache) - before)

    assert run(base) == 1
    assert run(base) == 0 and run(base, seed=5) == 0
    changed = AutoModelForImageTextToText.from_pretrained(base)
    with torch.no_grad():
        changed.model.multi_modal_projector.linear_1.weight.mul_(2)
        changed.model.vision_tower.encoder.layers[2].mlp.fc1.weight.mul_(2)  # not read
    processor = AutoProcessor.from_pretrained(base)
    assert run(changed, processing_class=processor) == 0
    with torch.no_grad():
        changed.model.vision_tower.encoder.layers[0].mlp.fc1.weight[0, 0] += 1
    assert run(changed, processing_class=processor) == 1
    processor.image_processor.image_mean = [0.1, 0.1, 0.1]
    assert run(base, processing_class=processor) == 1
    assert passes["tiles"] == 2 * (2 + 3)
    assert run(base, dualspeed=DualSpeedConfig(pruner="visionzip")) == 1  # it reads keys too
    assert run(base, dualspeed=DualSpeedConfig(pruner="visionzip")) == 0


@pytest.mark.slow
def test_a_damaged_file_is_never_read_and_is_made_anew(base, files, tmp_path):
    rows, cache = rows_of(files), tmp_path / "cache"
    expected = losses(trainer(base, tmp_path, rows, cache))
    (folder,) = cache.glob("*/address.json")
    file = file_of(folder.parent, image_digest(rows[0]["images"][0]))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(FeatureCacheError, match=f"{file} was damaged and is removed; start again"):
        trainer(base, tmp_path, rows, cache).train()
    assert losses(trainer(base, tmp_path, rows, cache)) == expected
    assert file.read_bytes() == whole


def test_a_disk_too_small_is_refused_after_a_few_images(base, files, tmp_path, monkeypatch):
    usage = stored_features.check_space.__globals__["shutil"].disk_usage(tmp_path)
    monkeypatch.setattr("dualspeed.training.feature_folder.shutil.disk_usage", lambda path: usage._replace(free=4000))
    with pytest.raises(FeatureCacheError, match=r"2 images need [\d.]+e-06 GB, and 4e-06 GB are free; valid: a folder"):
        trainer(base, tmp_path, rows_of(files), tmp_path / "cache").get_train_dataloader()


def test_what_changes_features_is_refused(base, files, tmp_path):
    rows = rows_of(files)
    with pytest.raises(ConfigError, match=r"cache_features: the vision tower is trained.*valid: null"):
        trainer(base, tmp_path, rows, tmp_path / "c", vision_learning_rate=1e-6).train()
    whole = DualSpeedModel(AutoModelForImageTextToText.from_pretrained(base), MIXED)
    with pytest.raises(ConfigError, match=r"cache_features: the vision tower is trained.*valid: null"):
        processor = AutoProcessor.from_pretrained(base)
        trainer(whole, tmp_path, rows, tmp_path / "c", dualspeed=None, processing_class=processor).train()
    pruned = DualSpeedConfig(pixel_pruning=0.1)
    with pytest.raises(ConfigError, match=r"cache_features: with pixel_pruning other pixels.*valid: null"):
        trainer(tiny_chat("qwen2_vl", tmp_path / "qwen"), tmp_path, rows, tmp_path / "c", pruned).train()
    with pytest.raises(ConfigError, match=r"cache_features: function doesn't say which images.*ConversationCollator"):
        trainer(base, tmp_path, rows, tmp_path / "c", data_collator=lambda rows: rows).train()

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(rows)

    with pytest.raises(ConfigError, match="cache_features: the images of a stream aren't known before training"):
        trainer(base, tmp_path, Stream(), tmp_path / "c").train()
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (families.mistral3, "has a tower whose outputs can't be told apart by image; valid: null, or a model of"),
        (families.onevision, "cuts an image into tiles only where its sample has no other"),
        (lambda: with_dropout(tiny.llava()), "draws at random in its tower .attention_dropout in its vision_config"),
    ],
)
def test_towers_without_features_of_one_image_are_refused(build, reason):
    with pytest.raises(ModelError, match=f"cache_features: .*{reason}"):
        stored_features.check_keepable(build())


def with_dropout(vlm):
    vlm.config.vision_config.attention_dropout = 0.1
    return vlm


def test_a_tower_that_reading_would_change_is_refused(monkeypatch):
    """By a check of outputs that come in float16."""
    vlm = tiny.llava()
    stored_features.check_alike(vlm, ["cls_attention"])
    exact = stored_features.states_of_images
    rounded = lambda *given: {name: values.half().float() for name, values in exact(*given).items()}  # noqa: E731
    monkeypatch.setattr(stored_features, "states_of_images", rounded)
    with pytest.raises(ModelError, match="LlavaForConditionalGeneration has other features when its tower's outputs"):
        stored_features.check_alike(vlm, ["cls_attention"])
