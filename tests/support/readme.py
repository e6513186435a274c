"""Library examples of the README, and the files that they read."""

import json
import re
from pathlib import Path

from PIL import Image

from tests.support import tiny
from tests.support.paths import REPOSITORY

README = (REPOSITORY / "README.md").read_text()

TRAINING, INFERENCE = (
    code.replace("llava-hf/llava-1.5-7b-hf", "base")
    for code in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
)


def make_inputs(folder: Path) -> None:
    """Write the example's inputs: a checkpoint, conversations and their images."""
    tiny.make_llava(folder / "base")
    (folder / "images").mkdir()
    rows = []
    for index in range(6):
        Image.new("RGB", (28, 28), (40 * index, 0, 0)).save(folder / "images" / f"{index}.png")
        turns = [("human", "<image>\nis there a red digit ?"), ("gpt", "yes"), ("human", "how many ?"), ("gpt", "2")]
        conversation = [{"from": role, "value": text} for role, text in turns]
        rows.append({"id": str(index), "image": f"{index}.png", "conversations": conversation})
    (folder / "conversations.json").write_text(json.dumps(rows))
