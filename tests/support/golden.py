"""Golden numbers: inputs and outputs of the published implementation, and a model with its weights."""

import json

import torch
from safetensors.torch import load_file

from dualspeed import DualSpeedConfig, DualSpeedModel
from dualspeed.method.checkpoint import load_vlm
from tests.support.paths import GOLDEN

ARRAYS = load_file(GOLDEN / "cases.safetensors")
CASES = json.loads((GOLDEN / "cases.json").read_text())


def golden_model(pruning_ratio: float = 0.9) -> DualSpeedModel:
    """Model with the published implementation's weights and isolator, its tower frozen."""
    model = DualSpeedModel(load_vlm(GOLDEN / "model"), DualSpeedConfig(pruning_ratio=pruning_ratio))
    model.vlm.model.vision_tower.requires_grad_(False)
    with torch.no_grad():
        model.mode_isolator.weight.copy_(ARRAYS["mode_isolator"])
    return model


def batch(case: str) -> dict[str, torch.Tensor]:
    """Inputs of a golden case."""
    names = ("input_ids", "labels", "attention_mask", "pixel_values")
    return {name: ARRAYS[f"{case}/{name}"] for name in names if f"{case}/{name}" in ARRAYS}
