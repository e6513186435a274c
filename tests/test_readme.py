"""The README's library example runs as it stands, but for the checkpoint's name."""

import json
import re
from pathlib import Path

import tiny
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_library_examples(tmp_path, monkeypatch):
    tiny.make_llava(tmp_path / "base")
    (tmp_path / "images").mkdir()
    rows = []
    for index in range(6):
        Image.new("RGB", (28, 28), (40 * index, 0, 0)).save(tmp_path / "images" / f"{index}.png")
        turns = [("human", "<image>\nis there a red digit ?"), ("gpt", "yes"), ("human", "how many ?"), ("gpt", "2")]
        conversation = [{"from": role, "value": text} for role, text in turns]
        rows.append({"id": str(index), "image": f"{index}.png", "conversations": conversation})
    (tmp_path / "conversations.json").write_text(json.dumps(rows))
    monkeypatch.chdir(tmp_path)

    training, inference = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict = {}
    exec(training.replace("llava-hf/llava-1.5-7b-hf", "base"), names)
    processor = AutoProcessor.from_pretrained("out/final")
    AutoModelForImageTextToText.from_pretrained("out/final")
    names["inputs"] = processor(
        text="USER: <image> is there a digit ? ASSISTANT:", images=Image.new("RGB", (28, 28)), return_tensors="pt"
    )
    exec(inference, names)
    assert names["trainer"].state.global_step == 2
    prompt = names["inputs"]["input_ids"]
    assert torch.equal(names["answer"][:, : prompt.shape[1]], prompt)
