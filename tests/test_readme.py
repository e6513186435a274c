"""The README's library example runs as it stands, but for the checkpoint's name."""

import json
import re
from pathlib import Path

import tiny
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

README = (Path(__file__).parent.parent / "README.md").read_text()
TRAINING, INFERENCE = (
    code.replace("llava-hf/llava-1.5-7b-hf", "base")
    for code in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
)


def make_inputs(folder: Path) -> None:
    """What the example reads: a checkpoint, conversations and their images."""
    tiny.make_llava(folder / "base")
    (folder / "images").mkdir()
    rows = []
    for index in range(6):
        Image.new("RGB", (28, 28), (40 * index, 0, 0)).save(folder / "images" / f"{index}.png")
        turns = [("human", "<image>\nis there a red digit ?"), ("gpt", "yes"), ("human", "how many ?"), ("gpt", "2")]
        conversation = [{"from": role, "value": text} for role, text in turns]
        rows.append({"id": str(index), "image": f"{index}.png", "conversations": conversation})
    (folder / "conversations.json").write_text(json.dumps(rows))


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
