"""The README's library examples run as they stand, except for the checkpoint's name."""

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.support.readme import INFERENCE, TRAINING, make_inputs


def test_library_examples(tmp_path, monkeypatch):
    make_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(TRAINING, names)
    processor = AutoProcessor.from_pretrained("out/final")
    AutoModelForImageTextToText.from_pretrained("out/final")
    names["inputs"] = processor(
        text="USER: <image> is there a digit ? ASSISTANT:", images=Image.new("RGB", (28, 28)), return_tensors="pt"
    )
    exec(INFERENCE, names)
    assert names["trainer"].state.global_step == 2
    prompt = names["inputs"]["input_ids"]
    assert torch.equal(names["answer"][:, : prompt.shape[1]], prompt)
