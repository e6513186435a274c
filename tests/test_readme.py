"""The README's second library example runs as it stands on what the first one saves (tests/training/test_ten_lines)."""

import torch
from PIL import Image
from transformers import AutoProcessor

from tests.support.readme import INFERENCE
from tests.support.ten_lines import run


def test_generating_on_pruned_tokens(tmp_path, monkeypatch):
    trainer = run(tmp_path, monkeypatch, "qwen3_vl")
    assert trainer.state.global_step == 20
    content = [{"type": "image", "image": Image.new("RGB", (40, 28))}, {"type": "text", "text": "What is this?"}]
    inputs = AutoProcessor.from_pretrained("out/final").apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    names = {"inputs": inputs}
    exec(INFERENCE, names)
    prompt = inputs["input_ids"]
    assert torch.equal(names["answer"][:, : prompt.shape[1]], prompt)
