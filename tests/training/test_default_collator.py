"""Model, processor, collator and datasets that DualSpeedTrainer makes itself where none are given."""

import json

import pytest
import torch
from PIL import Image
from transformers import TrainingArguments

from dualspeed import DualSpeedConfig, DualSpeedTrainer
from dualspeed.errors import ConfigError
from tests.support import tiny
from tests.support.tiny_chat import tiny_chat


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_chat("qwen3_vl", tmp_path_factory.mktemp("base"))


def row(number: int, **changes) -> dict:
    image = Image.new("RGB", (40, 40), (50 * number, 0, 0))
    return {"prompt": f"What is {number}?", "completion": "a square", "images": [image]} | changes


def trainer(base, folder, rows=None, **given) -> DualSpeedTrainer:
    names = set(TrainingArguments.__dataclass_fields__)
    arguments = {name: given.pop(name) for name in list(given) if name in names}
    arguments = {"max_steps": 2, "use_cpu": True, "report_to": [], "disable_tqdm": True} | arguments
    rows = [row(number) for number in range(4)] if rows is None else rows
    return DualSpeedTrainer(base, TrainingArguments(str(folder), **arguments), train_dataset=rows, **given)


def test_max_length_cuts_rows(base, tmp_path):
    rows = [row(0, completion="a square " * 40)]
    whole, cut = (trainer(base, tmp_path, rows, max_length=length) for length in (None, 80))
    lengths = [made.data_collator([made.train_dataset[0]])["input_ids"].shape[1] for made in (whole, cut)]
    assert lengths[0] > 80 and lengths[1] == 80


@pytest.mark.parametrize("argument", [{"max_length": 9}, {"to_messages": dict}])
def test_what_another_collator_would_not_see_is_refused(tmp_path, argument):
    with pytest.raises(ConfigError, match="have no effect on rows that `data_collator` reads"):
        trainer(tiny.llava(), tmp_path, data_collator=list, **argument)


def test_to_messages_makes_rows_readable(base, tmp_path):
    def to_messages(one):
        return [{"role": "user", "content": one["q"]}, {"role": "assistant", "content": one["a"]}]

    made = trainer(base, tmp_path, [{"q": "1 + 1?", "a": "2"}], to_messages=to_messages)
    batch = made.data_collator([made.train_dataset[0]])
    assert made.processing_class.tokenizer.decode(batch["labels"][batch["labels"] != -100]) == "2<|im_end|>"


def test_slow_steps_in_parts_get_their_number_of_images(base, tmp_path):
    made = trainer(base, tmp_path, dualspeed=DualSpeedConfig(slow_mode_ratio=1.0), slow_batch_size=1)
    assert made.data_collator([made.train_dataset[0]])["num_images"] == [1]
    made.train()


def test_pruners_that_read_the_question_get_it(base, tmp_path):
    made = trainer(base, tmp_path, dualspeed=DualSpeedConfig(pruner="cdpruner", slow_mode_ratio=0.0))
    assert "question_ids" in made.data_collator([made.train_dataset[0]])
    made.train()


def test_unusable_rows_are_listed_those_that_the_template_refuses_too(base, tmp_path):
    rows = [row(0), row(1, images=["nowhere.png"]), row(2, prompt="What is <|image_pad|>?"), row(3)]
    made = trainer(base, tmp_path, rows, max_dropped_share=0.5)
    assert len(made.train_dataset) == 2
    listed = [json.loads(line) for line in (tmp_path / "dropped_rows_train.jsonl").read_text().splitlines()]
    assert [(entry["row"], entry["reason"]) for entry in listed] == [
        (1, "missing"),
        (2, "refused by the chat template"),
    ]


@pytest.mark.parametrize("bf16", [False, True])
def test_a_checkpoints_trained_weights_are_held_in_float32_and_saved_in_its_dtype(base, tmp_path, bf16):
    folder = tmp_path / "bfloat16"
    first = trainer(base, tmp_path)
    first.inner_model.vlm.to(torch.bfloat16).save_pretrained(folder)
    first.processing_class.save_pretrained(folder)
    made = trainer(folder, tmp_path, bf16=bf16)
    dtypes = {(values.requires_grad, values.dtype) for values in made.model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16 if bf16 else torch.float32)}
    made.save_model(str(tmp_path / "out"))
    kept = torch.bfloat16 if bf16 else torch.float32
    assert (
        DualSpeedTrainer(tmp_path / "out", TrainingArguments(str(tmp_path), bf16=True, use_cpu=True)).model.stored_dtype
        is kept
    )


def test_a_model_without_a_processor_needs_one(tmp_path):
    with pytest.raises(ConfigError, match="processing_class: the model names no checkpoint; valid: a processor"):
        trainer(tiny.llava(), tmp_path)
    tiny.llava().save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"processing_class: .*model has no processor"):
        trainer(tmp_path / "model", tmp_path)
