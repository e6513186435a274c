"""docs/trl.md: its diff turns a TRL script into one of ours, and the other programs' rows are read as they are."""

import json
import re

import datasets
import pytest
from PIL import Image
from trl import SFTTrainer

from dualspeed.settings.finetune import known_options
from dualspeed.trl import DualSpeedSFTTrainer
from tests.support.paths import REPOSITORY
from tests.support.sft import FAMILY, rows
from tests.support.tiny_chat import tiny_chat

PAGE = (REPOSITORY / "docs" / "trl.md").read_text()
(DIFF,) = re.findall(r"```diff\n(.*?)```", PAGE, flags=re.DOTALL)


def side(sign: str) -> str:
    """Script before the change (-) or after it (+)."""
    return "".join(line[1:] + "\n" for line in DIFF.splitlines() if line[:1] in ("", " ", sign))


def test_three_lines_are_added():
    assert sum(line.startswith("+") for line in DIFF.splitlines()) == 3


@pytest.mark.parametrize("sign, trainer", [("-", SFTTrainer), ("+", DualSpeedSFTTrainer)])
def test_the_script_trains_before_the_change_and_after_it(tmp_path, monkeypatch, sign, trainer):
    tiny_chat(FAMILY, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows("prompt and completion"))
    code = side(sign).replace("Qwen/Qwen2.5-VL-3B-Instruct", "base")
    code = code.replace('SFTConfig("out",', 'SFTConfig("out", use_cpu=True, bf16=False, max_steps=1, report_to=[],')
    names: dict = {}
    exec(code, names)
    assert type(names["trainer"]) is trainer and names["trainer"].state.global_step == 1
    held = {path.name for path in (tmp_path / "out" / "final").iterdir()}
    assert "model.safetensors" in held
    assert ("mode_isolator.safetensors" in held) is (sign == "+")


def test_every_option_of_the_table_exists():
    table = PAGE.partition("| LLaMA-Factory | axolotl | here |\n|---|---|---|\n")[2].partition("\n\n")[0]
    ours = [name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.strip("|").split("|")[-1])]
    assert len(ours) == 9 and set(ours) <= set(known_options())


LLAMA_FACTORY = {
    "messages": [{"content": "<image>Who are they?", "role": "user"}, {"content": "Two players.", "role": "assistant"}],
    "images": ["pictures/1.png"],
}
SHAREGPT = {
    "conversations": [{"from": "human", "value": "<image>Who?"}, {"from": "gpt", "value": "Two."}],
    "images": ["pictures/1.png"],
}
AXOLOTL = {
    "messages": [
        {"role": "user", "content": [{"type": "image", "path": "pictures/1.png"}, {"type": "text", "text": "Who?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Two."}]},
    ]
}


@pytest.mark.parametrize("row", [LLAMA_FACTORY, SHAREGPT, AXOLOTL])
def test_rows_of_other_programs_are_read(tmp_path, monkeypatch, row):
    from dualspeed.data.images import open_image
    from dualspeed.data.rows import read_row
    from dualspeed.training.finetune import load_rows

    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    folder = tmp_path if row is AXOLOTL else tmp_path / "data"
    (folder / "pictures").mkdir()
    Image.new("RGB", (9, 7)).save(folder / "pictures" / "1.png")
    (tmp_path / "data" / "rows.json").write_text(json.dumps([row]))
    images = [] if row is AXOLOTL else ["--images", "data"]
    from dualspeed.settings.finetune import read_options

    run = read_options(["--model", "m", "--data", "data/rows.json", "--output-dir", "o", *images]).run
    (read,) = load_rows(run, None)
    record = read_row(read, "row")
    assert [open_image(source).size for source in record["images"]] == [(9, 7)]
