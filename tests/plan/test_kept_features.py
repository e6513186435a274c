"""The plan's arithmetic for `cache_features`: bytes that a tower's outputs take."""

from pathlib import Path

import pytest
import torch

from dualspeed import DualSpeedConfig, DualSpeedModel
from dualspeed.method.vlm.tower_states import states_of_images
from dualspeed.plan.published import Checkpoint
from dualspeed.plan.report import plan
from dualspeed.plan.shapes import make_shape, shape_of_vlm
from dualspeed.settings.families import TowerKind
from tests.support import families, tiny
from tests.support.paths import REPOSITORY

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "image_size": 28, "patch_size": 7}


@pytest.mark.parametrize("size", [(28, 28), (20, 60), (200, 90)])
@pytest.mark.parametrize("grids", [None, tiny.GRID_PINPOINTS], ids=["llava", "llava_next"])
def test_kept_bytes_are_those_of_the_tensors(size, grids):
    shape = make_shape({}, VISION, 1, grids)
    model = DualSpeedModel(tiny.llava_next() if grids else tiny.llava(), DualSpeedConfig())
    images = {"pixel_values": torch.randn(1, 3, 28, 28)}
    if grids:
        tiles = shape.tower.num_tiles(*size)
        images = {"pixel_values": torch.randn(1, tiles, 3, 28, 28), "image_sizes": torch.tensor([size])}
    states = states_of_images(model.vlm.to(torch.bfloat16), images, ["cls_attention"])
    assert shape.encoded(*size).kept_bytes == sum(values.nbytes for values in states.values())


def test_kept_bytes_of_deepstack_are_those_of_all_layers_that_mergers_read():
    model = DualSpeedModel(families.qwen3_vl(), DualSpeedConfig())
    checkpoint = Checkpoint(kind=TowerKind.DEEPSTACK, config=model.vlm.config.to_dict(), images={"min_pixels": 16**2})
    images = {"pixel_values": torch.randn(24, 3 * 2 * 8**2), "image_grid_thw": torch.tensor([[1, 4, 6]])}
    states = states_of_images(model.vlm.to(torch.bfloat16), images, [])
    assert len(states) == 3
    assert shape_of_vlm(checkpoint).encoded(32, 48).kept_bytes == sum(values.nbytes for values in states.values())


def test_the_plan_says_what_a_folder_will_hold(tmp_path, monkeypatch):
    """LLaVA's 665,298 samples, of which 94 % have an image of 577 x 1,024 bfloat16 numbers."""
    monkeypatch.chdir(REPOSITORY)
    text = Path("config/paper/config.yaml").read_text()
    before, finetune, after = text.partition("      finetune: &llava_finetune\n")
    assert finetune
    (tmp_path / "config.yaml").write_text(f"{before}{finetune}        cache_features: /scratch/features\n{after}")
    assert "Kept features" not in plan(Path("config/paper"))
    (line,) = {line for line in plan(tmp_path).splitlines() if line.startswith("Kept features") and "1.5-7b" in line}
    assert line.startswith("Kept features (cache_features): up to 7")
    assert "GB in /scratch/features for llava-1.5-7b on data/" in line
