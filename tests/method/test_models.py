"""Every model type behind AutoModelForImageTextToText: a tiny model of its real class is trained, or it is refused."""

import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import gettempdir

import pytest
import torch
import transformers
from filelock import FileLock

from dualspeed import DualSpeedConfig, DualSpeedModel
from dualspeed.errors import ModelError
from dualspeed.method.vlm.families import FAMILIES, REFUSED
from tests.support.model_trials import TIMM, TRIALS, line_of, line_of_refused, refusal, stock
from tests.support.paths import REPOSITORY
from tests.support.tiny_models import MODEL_TYPES, model_without_weights, tiny_config

PAGE = REPOSITORY / "docs" / "models.md"
TABLE = re.compile(r"(?<=<!-- models:start -->\n)(.*?)(?=\n<!-- models:end -->)", re.DOTALL)
HEAD = ["| model type | class | verdict | methods | pruned by | to train |", "|---|---|---|---|---|---|"]
REASONS = (
    "it is an encoder-decoder",
    "its sequence has no image placeholders",
    "its images are discrete tokens",
    "it generates text by diffusion",
    "it has no text output",
)
"""Beginnings of the reasons for which a model may be refused."""
ACCEPTED = [name for name in MODEL_TYPES if name not in REFUSED]
by_accepted = pytest.mark.parametrize(
    "model_type",
    [pytest.param(name, marks=pytest.mark.torchvision if name in TIMM else pytest.mark.slow) for name in ACCEPTED],
)


def lines() -> dict[str, str]:
    """Model type -> its line in the table."""
    rows = TABLE.search(PAGE.read_text()).group(0).splitlines()
    assert rows[:2] == HEAD
    return {row.split("`")[1]: row for row in rows[2:]}


def check_line(model_type: str, line: str) -> None:
    """Compare a line with the table, or write it there with UPDATE_README=1."""
    if os.environ.get("UPDATE_README"):
        with FileLock(Path(gettempdir()) / "models.md.lock"):  # tests may run in several processes
            rows = lines() | {model_type: line}
            table = "\n".join([*HEAD, *(rows[name] for name in sorted(MODEL_TYPES) if name in rows)])
            PAGE.write_text(TABLE.sub(lambda _: table, PAGE.read_text()))
    assert lines().get(model_type) == line


@by_accepted
def test_an_accepted_model_passes_every_trial(model_type):
    if model_type in TIMM:
        pytest.importorskip("timm")
    for trial in TRIALS:
        trial(model_type)
    check_line(model_type, line_of(model_type, stock(model_type)))


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_a_refused_model_is_refused_for_one_of_the_reasons(model_type):
    reason = refusal(model_type)
    assert reason == REFUSED[model_type]
    assert reason.startswith(REASONS)
    check_line(model_type, line_of_refused(model_type, reason))


def test_the_table_has_a_line_for_every_model_type():
    assert list(lines()) == sorted(MODEL_TYPES)
    for model_type, line in lines().items():
        assert f"`{MODEL_TYPES[model_type]}`" in line
        assert ("| refused: " in line) == (model_type in REFUSED)


def test_records_are_of_model_types_that_transformers_has():
    assert {*FAMILIES, *REFUSED} <= set(MODEL_TYPES)
    assert not set(FAMILIES) & set(REFUSED)


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_what_is_refused_lacks_the_way_in(model_type):
    """It has no placeholder, reads images across, makes tokens of them, generates nothing or all at once."""
    vlm = model_without_weights(model_type)
    config = vlm.config
    has_placeholder = getattr(config, "image_token_id", None) is not None
    reads_across = config.is_encoder_decoder or any("cross_att" in name.lower() for name, _ in vlm.named_modules())
    generates = vlm.can_generate()
    tokenises = any("quantize" in name for name, _ in vlm.named_modules())
    assert not has_placeholder or reads_across or tokenises or not generates or "diffusion" in REFUSED[model_type]


@pytest.mark.parametrize(
    "model_types",
    [
        pytest.param([name for name in ACCEPTED if name not in TIMM], marks=pytest.mark.slow, id="others"),
        pytest.param(list(TIMM), marks=pytest.mark.torchvision, id="timm"),
    ],
)
def test_text_on_one_of_two_ranks_hangs_no_model(model_types):
    """Two processes train every accepted model with DDP, the second without images: gradients agree, nothing waits."""
    if model_types == list(TIMM):
        pytest.importorskip("timm")
    launcher = "-m torch.distributed.run --nproc-per-node=2 --standalone -m tests.support.models_worker"
    finished = subprocess.run(
        [sys.executable, *launcher.split(), *model_types],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert finished.returncode == 0, finished.stderr[-5000:]
    assert finished.stdout.split() == model_types


def test_a_model_that_is_not_whole_is_refused_at_construction():
    """Each part that is missing is named, before any step."""
    without_tower = stock("llava")
    del without_tower.model.vision_tower
    with pytest.raises(ModelError, match=r"vision tower \(model.vision_tower\) can't be found"):
        DualSpeedModel(without_tower, DualSpeedConfig())
    narrow = stock("llava")
    narrow.model.multi_modal_projector.linear_2 = torch.nn.Linear(32, 16)
    with pytest.raises(ModelError, match=r"features of shape \(16, 16\), not \(tokens, 32\)"):
        DualSpeedModel(narrow, DualSpeedConfig())
    broken = stock("llava")
    broken.model.multi_modal_projector.linear_1 = torch.nn.Linear(8, 32)
    with pytest.raises(ModelError, match="a blank image doesn't pass through its vision tower: mat1 and mat2"):
        DualSpeedModel(broken, DualSpeedConfig())
    miscounted = stock("gemma3")
    miscounted.config.mm_tokens_per_image = 9
    with pytest.raises(ModelError, match="a blank image becomes 4 tokens, but its configuration says 9"):
        DualSpeedModel(miscounted, DualSpeedConfig())


def test_a_model_without_weights_is_checked_as_far_as_its_device_goes(caplog):
    """On the meta device shapes are checked; towers that read numbers of an image can't run there, which is logged."""
    with torch.device("meta"):
        shapes = transformers.LlavaForConditionalGeneration(tiny_config("llava"))
        numbers = transformers.Qwen3VLForConditionalGeneration(tiny_config("qwen3_vl"))
    DualSpeedModel(shapes, DualSpeedConfig())
    assert "stays unproven" not in caplog.text
    shapes.model.multi_modal_projector.linear_2 = torch.nn.Linear(32, 16, device="meta")
    with pytest.raises(ModelError, match=r"features of shape \(16, 16\)"):
        DualSpeedModel(shapes, DualSpeedConfig())
    DualSpeedModel(numbers, DualSpeedConfig())
    assert "Qwen3VLForConditionalGeneration has no weights (meta device)" in caplog.text


def test_a_q_former_before_an_encoder_decoder_is_refused():
    """The class alone doesn't say: BLIP-2 takes language models of both kinds."""
    config = tiny_config("blip-2")
    config.text_config = transformers.T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, vocab_size=64)
    config.use_decoder_only_language_model = False
    with pytest.raises(ModelError, match="since it is an encoder-decoder"):
        DualSpeedModel(transformers.Blip2ForConditionalGeneration(config), DualSpeedConfig())
