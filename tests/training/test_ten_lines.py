"""The README's first ten lines, as they stand, on a tiny model of each family that has a training template.

Replaced are the model's name, by the tiny model's folder, the dataset's content, and the learning rate, which random
weights need larger.
"""

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainingArguments
from transformers.utils import is_torchvision_available

from dualspeed import DualSpeedTrainer
from tests.support.ten_lines import ANSWERS, run, the_cauldron
from tests.support.tiny_chat import CHATS, tiny_chat

QUICK = ("qwen3_vl", "gemma3", "smolvlm")
NAMES = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name, chat in CHATS.items()
    if is_torchvision_available() or not chat.needs_torchvision
]


@pytest.mark.parametrize("name", NAMES)
def test_the_ten_lines_learn_and_save_what_stock_classes_load(tmp_path, monkeypatch, name):
    trainer = run(tmp_path, monkeypatch, name)
    losses = [entry["fast/ce_loss"] for entry in trainer.state.log_history if "fast/ce_loss" in entry]
    assert min(losses[-4:]) < losses[0] / 2
    tower = [
        value for key, value in trainer.model.named_parameters() if "visual.blocks" in key or "vision_tower" in key
    ]
    assert not any(parameter.requires_grad and parameter.grad is not None for parameter in tower)

    processor = AutoProcessor.from_pretrained("out/final")
    model = AutoModelForImageTextToText.from_pretrained("out/final", dtype="float32")
    content = [{"type": "image", "image": Image.new("RGB", (40, 28))}, {"type": "text", "text": "What is this?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    answer = model.generate(**inputs, max_new_tokens=4)
    assert answer.shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize("name", NAMES)
def test_the_supervised_tokens_are_the_answers_and_their_ends(tmp_path, name):
    folder = tiny_chat(name, tmp_path / "base")
    args = TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to=[])
    trainer = DualSpeedTrainer(model=folder, args=args, train_dataset=the_cauldron())
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(4)])
    tokenizer, end = trainer.processing_class.tokenizer, CHATS[name].end_of_turn
    for labels, answers in zip(batch["labels"], [[one] for one in ANSWERS], strict=True):
        answers = [*answers, "yes"] if answers == [ANSWERS[1]] else answers
        # Some templates write a blank before an answer, which is then learned too.
        text = thoughtless(tokenizer.decode(labels[labels != -100]))
        assert [part.removeprefix(" ") for part in text.split(end)] == [*answers, ""]
    assert torch.equal(batch["labels"][batch["labels"] != -100], batch["input_ids"][batch["labels"] != -100])


def thoughtless(text: str) -> str:
    """Text without the empty thoughts that templates of reasoning models write before an answer."""
    for thought in ("<think>\n\n</think>\n\n", "<think>\n</think>\n\n"):
        text = text.replace(thought, "")
    return text
