"""The name of a state folder says what decides the result: each file that a stage reads, and none that it doesn't."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

import dualspeed
from dualspeed import chat_templates
from dualspeed.data.prepare import prepare_dataset
from dualspeed.errors import CheckpointError, ConfigError, InterruptedTrainingError
from dualspeed.evaluation.answering import checkpoint_checksum
from dualspeed.fingerprints import DECIDE_NOTHING, SAFE_WEIGHTS, checkpoint_files, checkpoint_fingerprint
from dualspeed.settings.jobs import write_settings
from dualspeed.settings.recipe import Recipe
from dualspeed.training.inputs import DEEPSPEED_FILE, LAUNCHER, launcher_settings
from dualspeed.training.stage import train
from dualspeed.training.state import open_state
from tests.support import tiny
from tests.support.opened_files import opened_files
from tests.support.paths import REPOSITORY
from tests.support.samples import entry
from tests.support.stage import assert_same_weights, stage_settings
from tests.support.word_tokenizer import word_tokenizer

PACKAGE = Path(dualspeed.__file__).parent
EXCEPTED = {"state.json": "its _fingerprint is another one every time; see the test of equal weights"}
"""Files that a stage reads, and of which not everything counts."""


def make_clip(folder: Path) -> None:
    """CLIP with the vision tower of the tiny LLaVA."""
    words = [*dict.fromkeys(tiny.WORDS), "<unk>", "<begin>", "<end>"]
    named = {"unk_token": "<unk>", "bos_token": "<begin>", "eos_token": "<end>", "pad_token": "<end>"}
    word_tokenizer(words, special_tokens=named).save_pretrained(folder)
    text = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"vocab_size": len(words), "max_position_embeddings": 16}
    text |= {"bos_token_id": words.index("<begin>"), "eos_token_id": words.index("<end>")}
    vision = tiny.configs()["vision_config"].to_dict()
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Folder of all that a stage reads: `base`, `clip`, and `data`, prepared from `images` and `data.json`."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "clip").mkdir()
    make_clip(folder / "clip")
    tiny.make_llava(folder / "base")
    for name in ("training.json", "metrics.jsonl", "training_args.bin", "README.md", ".gitattributes"):
        (folder / "base" / name).write_text("{}")
    (folder / "images").mkdir()
    entries = []
    for index in range(8):
        Image.new("RGB", (28, 28), (index * 30, 90, 128)).save(folder / f"images/{index}.png")
        entries.append(entry("<image>\nis there a red digit ?", "yes", name=str(index), image=f"{index}.png"))
    for name in ("data.json", "held_out.json"):
        (folder / name).write_text(json.dumps(entries))
    prepare_dataset(settings(folder).recipe.preparation(), folder / "base", folder / "data")
    return folder


def settings(folder: Path, **dualspeed_settings):
    """A stage of two steps with held-out conversations, and CLIP's relevance."""
    chosen = stage_settings(pruner="cdpruner", relevance_clip=str(folder / "clip"), **dualspeed_settings)
    values = {"annotations": str(folder / "data.json"), "images": str(folder / "images"), "chat_template": "turns"}
    arguments = chosen.recipe.training_arguments | {"max_steps": 2}
    recipe = Recipe(
        **values,
        global_batch_size=4,
        training_arguments=arguments,
        max_length=256,
        validation_annotations=str(folder / "held_out.json"),
        validation_steps=1,
    )
    return replace(chosen, recipe=recipe)


def name_of(folder: Path, root: Path, chosen=None) -> str:
    return open_state(root, chosen or settings(folder), folder / "base", folder / "data").name


def arguments_of(folder: Path, out: Path) -> list[str]:
    """Arguments of `dualspeed train`, as the rule gives them."""
    words = ["train", "--settings", str(write_settings(settings(folder), out / "settings"))]
    words += ["--model", str(folder / "base"), "--data", str(folder / "data")]
    return [*words, "--state", str(out / "state"), "--out", str(out / "model")]


@pytest.fixture(scope="module")
def read(inputs, tmp_path_factory):
    """Files outside the environment that a stage reads, by their paths."""
    out = tmp_path_factory.mktemp("traced")
    opened = opened_files(arguments_of(inputs, out), [inputs], out / "opened.txt")
    assert (out / "model/model.safetensors").exists()
    is_package = (".py", ".pyc"), ".egg-info"
    return {
        path
        for path in opened
        if out not in path.parents and path.suffix not in is_package[0] and path.parent.suffix != is_package[1]
    }


def test_the_trace_sees_files_of_every_library(read, inputs):
    """Python's, those of safetensors and tokenizers (Rust), and of pyarrow (C++)."""
    names = {path.relative_to(inputs).as_posix() for path in read if inputs in path.parents}
    assert {"base/config.json", "base/model.safetensors", "base/tokenizer.json", "clip/model.safetensors"} <= names
    assert "images/0.png" in names and any(name.startswith("data/validation/") for name in names)
    assert any(name.startswith("data/") and name.endswith(".arrow") for name in names)
    assert PACKAGE / "chat_templates/turns.jinja" in read


def test_each_file_that_a_stage_reads_changes_the_name(read, inputs, tmp_path, monkeypatch):
    before = name_of(inputs, tmp_path / "state")
    counted, others = set(), set()
    for path in sorted(read):
        if inputs in path.parents and path.parent != inputs / "images" and path.name not in EXCEPTED:
            content = path.read_bytes()
            path.write_bytes(content + b" ")
            assert name_of(inputs, tmp_path / "state") != before, path
            path.write_bytes(content)
            counted.add(path)
        else:
            others.add(path)
    assert name_of(inputs, tmp_path / "state") == before
    assert len(counted) >= 12
    images = {path for path in others if path.parent == inputs / "images"}
    exceptions = {path for path in others if path.name in EXCEPTED}
    template = PACKAGE / "chat_templates/turns.jinja"
    assert others - images - exceptions == {template}
    shutil.copytree(template.parent, tmp_path / "templates")
    monkeypatch.setattr(chat_templates, "_FOLDER", tmp_path / "templates")
    assert name_of(inputs, tmp_path / "state") == before
    (tmp_path / "templates/turns.jinja").write_text(template.read_text() + " ")
    assert name_of(inputs, tmp_path / "state") != before


def test_no_file_that_is_left_out_is_read(read, inputs):
    left_out = {path for path in (inputs / "base").iterdir() if path not in checkpoint_files(inputs / "base")}
    assert {path.name for path in left_out} == {
        "training.json",
        "metrics.jsonl",
        "training_args.bin",
        "README.md",
        ".gitattributes",
    }
    assert not left_out & read
    assert len(DECIDE_NOTHING) == 11  # each with its reason


def test_an_image_counts_through_the_manifest_of_preparation(inputs, tmp_path):
    """Not by its own content: images are many, and a look at each would cost a resumed job minutes."""
    before = name_of(inputs, tmp_path / "state")
    folder = tmp_path / "inputs"
    shutil.copytree(inputs, folder)
    Image.new("RGB", (28, 28), (1, 2, 3)).save(inputs / "images/0.png")
    try:
        assert name_of(inputs, tmp_path / "state") == before
        prepare_dataset(settings(inputs).recipe.preparation(), inputs / "base", folder / "data")
        changed = open_state(tmp_path / "state", settings(inputs), inputs / "base", folder / "data").name
    finally:
        shutil.copy(folder / "images/0.png", inputs / "images/0.png")
    assert changed != before
    prepare_dataset(settings(inputs).recipe.preparation(), inputs / "base", folder / "data")
    assert open_state(tmp_path / "state", settings(inputs), inputs / "base", folder / "data").name == before


@pytest.mark.slow
def test_what_is_excepted_changes_no_weight(inputs, tmp_path):
    """Another _fingerprint of the prepared dataset, and other records in the checkpoint."""
    for name in ("one", "two"):
        folder = tmp_path / name
        shutil.copytree(inputs, folder)
        if name == "two":
            for path in (folder / "data/state.json", folder / "data/validation/state.json"):
                path.write_text(
                    json.dumps(json.loads(path.read_text()) | {"_fingerprint": "0123456789abcdef"}, indent=3)
                )
            for path in set((folder / "base").iterdir()) - set(checkpoint_files(folder / "base")):
                path.write_text('{"other": 1}')
        train(settings(inputs), folder / "base", folder / "data", tmp_path / "state" / name, tmp_path / f"{name}-out")
    states = [path.name for path in sorted((tmp_path / "state").glob("*/*")) if path.is_dir()]
    assert len(states) == 2 and states[0] == states[1]
    assert_same_weights(tmp_path / "one-out", tmp_path / "two-out")


def as_bin(folder: Path, shards: int = 1) -> None:
    """Give a checkpoint the older form: pytorch_model.bin, or shards with an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(weights, folder / "pytorch_model.bin")
        return
    names = [f"pytorch_model-{number:05}-of-{shards:05}.bin" for number in range(1, shards + 1)]
    for number, name in enumerate(names):
        torch.save({key: value for key, value in list(weights.items())[number::shards]}, folder / name)
    index = {key: names[number % shards] for number, key in enumerate(weights)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def shift(path: Path) -> None:
    """Other weights in the same file."""
    weights = torch.load(path, weights_only=True) if path.suffix == ".bin" else load_file(path)
    changed = {name: value + 0.25 if "lm_head" in name else value for name, value in weights.items()}
    torch.save(changed, path) if path.suffix == ".bin" else save_file(changed, path, metadata={"format": "pt"})


@pytest.mark.parametrize("shards", [1, 2])
def test_other_weights_of_the_older_form_start_a_run_anew(inputs, tmp_path, shards):
    """A run that was stopped is never resumed on them."""
    base = tmp_path / "base"
    shutil.copytree(inputs / "base", base)
    as_bin(base, shards)
    chosen = settings(inputs)
    arguments = (chosen, base, inputs / "data", tmp_path / "state", tmp_path / "out")
    with pytest.raises(InterruptedTrainingError, match="1 of 2 steps"):
        train(*arguments, time_limit=1e-6)
    for path in base.glob("pytorch_model*.bin"):
        shift(path)
    with pytest.raises(InterruptedTrainingError, match="1 of 2 steps"):  # 2 of 2 if it went on
        train(*arguments, time_limit=1e-6)
    assert len(list((tmp_path / "state").glob("*/checkpoints"))) == 2


def changed_fingerprint(folder: Path, name: str, content: str = "other") -> bool:
    before = checkpoint_fingerprint(folder), checkpoint_checksum(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(content)
    after = checkpoint_fingerprint(folder), checkpoint_checksum(folder)
    (folder / name).unlink()
    assert (before[0] == after[0]) == (before[1] == after[1])  # a training's state and an answer's alike
    return before != after


@pytest.mark.parametrize(
    "name",
    [
        *(
            "pytorch_model.bin.index.json",
            "pytorch_model-00001-of-00002.bin",
            "generation_config.json",
            "tokenizer.model",
        ),
        *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
        *("vocab.txt", "chat_template.jinja", "chat_template.json", "additional_chat_templates/tool.jinja"),
        *(
            "preprocessor_config.json",
            "processor_config.json",
            "video_preprocessor_config.json",
            "mode_isolator.safetensors",
        ),
        *("adapter_config.json", "adapter_model.safetensors", "modeling_other.py"),
    ],
)
def test_every_file_of_a_checkpoint_counts(inputs, tmp_path, name):
    shutil.copytree(inputs / "base", tmp_path / "base")
    as_bin(tmp_path / "base")
    (tmp_path / "base" / name).unlink(missing_ok=True)
    assert changed_fingerprint(tmp_path / "base", name)


@pytest.mark.parametrize("name", ["LICENSE.txt", "NOTICE", "x.gguf", "tf_model.h5", "flax_model.msgpack", ".gitignore"])
def test_what_no_job_reads_does_not_count(inputs, tmp_path, name):
    shutil.copytree(inputs / "base", tmp_path / "base")
    assert not changed_fingerprint(tmp_path / "base", name)


def test_weights_of_the_older_form_do_not_count_beside_those_of_the_newer(inputs, tmp_path):
    shutil.copytree(inputs / "base", tmp_path / "base")
    assert (tmp_path / "base" / SAFE_WEIGHTS[0]).exists()
    assert not changed_fingerprint(tmp_path / "base", "pytorch_model.bin")
    (tmp_path / "base" / SAFE_WEIGHTS[0]).rename(tmp_path / "base/mode_isolator.safetensors")
    assert changed_fingerprint(tmp_path / "base", "pytorch_model.bin")


@pytest.mark.parametrize("lost", ["model.safetensors", "config.json"])
def test_a_folder_without_weights_or_configuration_is_an_error(inputs, tmp_path, lost):
    shutil.copytree(inputs / "base", tmp_path / "base")
    for path in (tmp_path / "base" / lost, tmp_path / "base/training_args.bin"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"no \*.safetensors or \*.bin with a config.json in this folder"):
        open_state(tmp_path / "state", settings(inputs), tmp_path / "base", inputs / "data")


def test_the_clip_of_relevance_counts_for_the_answers_too_and_only_where_it_is_read(inputs, tmp_path):
    shutil.copytree(inputs, tmp_path / "inputs")
    clip, base = tmp_path / "inputs/clip", tmp_path / "inputs/base"
    (base / "dualspeed.json").write_text(json.dumps({"pruner": "cdpruner", "relevance_clip": str(clip)}))
    chosen = replace(settings(inputs), dualspeed=replace(settings(inputs).dualspeed, relevance_clip=str(clip)))
    unread = replace(chosen, dualspeed=replace(chosen.dualspeed, pruner="divprune"))

    def names():
        states = [open_state(tmp_path / "s", one, base, inputs / "data").name for one in (chosen, unread)]
        return [*states, checkpoint_checksum(base)]

    before = names()
    shift_all = load_file(clip / "model.safetensors")
    save_file({name: value + 1 for name, value in shift_all.items()}, clip / "model.safetensors", {"format": "pt"})
    after = names()
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, True, False]


@pytest.fixture
def launched(monkeypatch):
    """Function that sets the environment that `accelerate launch` would leave."""
    for name in (*LAUNCHER, DEEPSPEED_FILE):
        monkeypatch.delenv(name, raising=False)
    return lambda **variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


def test_a_precision_that_the_launcher_sets_counts_unless_the_recipe_sets_one(inputs, tmp_path, launched):
    before = name_of(inputs, tmp_path)
    launched(ACCELERATE_MIXED_PRECISION="no")  # what our own launcher sets
    assert name_of(inputs, tmp_path) == before
    launched(ACCELERATE_MIXED_PRECISION="bf16")
    assert name_of(inputs, tmp_path) != before
    assert launcher_settings({"bf16": True}) == {}


def test_a_deepspeed_file_counts_as_far_as_it_decides_the_result(inputs, tmp_path, launched):
    """How processes share a model doesn't; a resume on another way of sharing is refused by its own check."""
    before = name_of(inputs, tmp_path / "state")
    file = tmp_path / "deepspeed.json"
    launched(**{DEEPSPEED_FILE: str(file)})
    shared = [json.loads((REPOSITORY / f"config/accelerate/zero{stage}.json").read_text()) for stage in (2, 3)]
    for content in (*shared, shared[0] | {"steps_per_print": 7, "wall_clock_breakdown": True}):
        file.write_text(json.dumps(content))
        assert name_of(inputs, tmp_path / "state") == before, content
    deciding = (
        {"gradient_clipping": 0.5},
        {"bf16": {"enabled": True}},
        {"optimizer": {"type": "Adam", "params": {"lr": 1}}},
    )
    names = set()
    for change in (*deciding, {"communication_data_type": "fp16"}, {"prescale_gradients": True}):
        file.write_text(json.dumps(shared[0] | change))
        names.add(name_of(inputs, tmp_path / "state"))
    assert len(names) == 5 and before not in names


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "No such file .*; valid: DeepSpeed's settings as JSON"),
        ("{", r"Expecting property name .*line 1 column 2.*; valid: DeepSpeed's settings as JSON"),
        ("[]", r"top level: \[\] is of type list; valid: dict"),
    ],
)
def test_a_broken_deepspeed_file_is_one_clear_error(inputs, tmp_path, launched, content, message):
    file = tmp_path / "deepspeed.json"
    if content is not None:
        file.write_text(content)
    launched(**{DEEPSPEED_FILE: str(file)})
    with pytest.raises(ConfigError, match=f"{file}: .*{message}"):
        name_of(inputs, tmp_path / "state")


def test_the_accelerate_files_of_the_repository_say_what_the_launcher_hands_on():
    """Beside how processes share a model there is the precision, which the launcher puts into LAUNCHER."""
    assert not set(LAUNCHER) & set(os.environ) or os.environ.get(LAUNCHER[0]) == "no"
    for file in (REPOSITORY / "config/accelerate").glob("*.yaml"):
        keys = {line.partition(":")[0] for line in file.read_text().splitlines() if line[:1].isalpha()}
        assert keys <= {
            "compute_environment",
            "distributed_type",
            "deepspeed_config",
            "fsdp_config",
            "mixed_precision",
            "num_machines",
            "num_processes",
        }, file
