"""Share of the vision tower in fast steps of Qwen3-VL, and the speedup that it leaves, by the FLOPs that torch counts.

    python -m measurements.tower_share

The models have their real sizes and no weights (torch's meta device), so that nothing is computed. A sample has one
picture of 1,024 visual tokens and 220 text tokens, 130 of them supervised; p = 0.9, r = 0.1; the tower is frozen, but
for the mergers at its end; steps on full tokens recompute the language model's activations. With PixelPrune, half of
the squares enter the tower.
"""

from collections.abc import Callable

import pandas as pd
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from dualspeed.settings.budget import num_tokens_to_keep

VISUAL, TEXT, SUPERVISED, ISOLATOR = 1024, 220, 130, 4
PRUNING_RATIO, SLOW_MODE_RATIO = 0.9, 0.1
VOCABULARY = 151_936
ROPE = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]}
COMMON = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": VOCABULARY, "rope_parameters": ROPE}
SMALL_TOWER = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
LARGE_TOWER = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
SIZES = {
    "Qwen3-VL-2B": ((2048, 6144, 28, 16), SMALL_TOWER),
    "Qwen3-VL-4B": ((2560, 9728, 36, 32), SMALL_TOWER),
    "Qwen3-VL-8B": ((4096, 12288, 36, 32), LARGE_TOWER),
}
"""Name -> width, inner width, layers and heads of the language model, and the tower."""


def main() -> None:
    """Print a line for each model."""
    print(pd.DataFrame([shares(name) for name in SIZES]).to_markdown(index=False))


def shares(name: str) -> dict[str, str]:
    """Line of the table."""
    vlm = model_of(name)
    whole, half = (count(lambda squares=squares: tower_step(vlm, squares)) for squares in (VISUAL, VISUAL // 2))
    short, full = num_tokens_to_keep(VISUAL, PRUNING_RATIO) + ISOLATOR + TEXT, VISUAL + TEXT
    fast, slow = (count(lambda tokens=tokens: language_step(vlm, tokens)) for tokens in (short, full))
    teacher, recomputed = (count(lambda tokens=tokens: blocks(vlm, tokens)) for tokens in (short, full))
    baseline = whole + slow + recomputed

    def speedup(fast_step: float, of_teacher: float) -> str:
        mixed = (1 - SLOW_MODE_RATIO) * fast_step + SLOW_MODE_RATIO * (baseline + of_teacher)
        return f"{baseline / mixed:.2f}x"

    return {
        "model": name,
        "tower's share of a fast step": f"{whole / (whole + fast):.0%}",
        "limit of the speedup": speedup(whole + fast, teacher),
        "share with PixelPrune": f"{half / (half + fast):.0%}",
        "limit with PixelPrune": speedup(half + fast, teacher + half),
        "limit without a tower's cost": speedup(fast, teacher),
    }


def model_of(name: str) -> PreTrainedModel:
    """Model on the meta device, whose tower is frozen, but for the mergers at its end (the projector)."""
    (width, inner, layers, heads), tower = SIZES[name]
    text = COMMON | {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    config = Qwen3VLConfig(
        text_config=text | {"num_attention_heads": heads},
        vision_config=tower | {"num_heads": 16, "out_hidden_size": width},
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        vlm = Qwen3VLForConditionalGeneration(config)
    visual = vlm.model.visual.requires_grad_(False)
    for merger in (visual.merger, visual.deepstack_merger_list):
        merger.requires_grad_(True)
    return vlm


def tower_step(vlm: PreTrainedModel, squares: int) -> None:
    """Forward pass of the tower on the first `squares` squares of a picture, and the mergers' backward pass."""
    side = 2 * int(VISUAL**0.5)
    grid, patches = torch.tensor([[1, side, side]]), 4 * squares
    taps, weights = get_vision_interpolation_indices_and_weights(grid, 48, align_corners=True, spatial_merge_size=2)
    output = vlm.model.visual(
        torch.empty(patches, 3 * 2 * 16**2, device="meta"),
        grid_thw=grid,
        position_ids=get_vision_position_ids(grid, 2)[:patches].to("meta"),
        interp_indices=taps[:patches].to("meta"),
        interp_weights=weights[:patches].to("meta"),
        cu_seqlens=torch.tensor([0, patches]),
    )
    sum(features.sum() for features in (output.pooler_output, *output.deepstack_features)).backward()


def blocks(vlm: PreTrainedModel, tokens: int) -> torch.Tensor:
    """Output of the language model's blocks on one sequence."""
    embeddings = torch.empty(1, tokens, vlm.config.text_config.hidden_size, device="meta", requires_grad=True)
    positions = torch.zeros(3, 1, tokens, dtype=torch.long, device="meta")
    return vlm.model.language_model(inputs_embeds=1 * embeddings, position_ids=positions, use_cache=False)[0]


def language_step(vlm: PreTrainedModel, tokens: int) -> None:
    """Forward and backward pass of the language model on one sequence, with logits at supervised positions."""
    vlm.lm_head(blocks(vlm, tokens)[:, -SUPERVISED:]).sum().backward()


def count(step: Callable[[], object]) -> int:
    """FLOPs of a call."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
