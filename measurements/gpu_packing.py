"""Packed steps of measurements/gpu.py: rows of a batch behind one another, beside rows that are padded.

The steps are those of `gpu_steps`, by LoRA. Padded rows run with SDPA, which is what transformers chooses.
"""

import statistics
from importlib.util import find_spec

import torch

from dualspeed.method.model import DualSpeedModel
from dualspeed.method.objective import Objective
from dualspeed.method.packing import check_packing
from measurements import gpu_device as devices
from measurements.gpu_cells import Bench, Cells, Reason, reasons
from measurements.gpu_models import Shape, batch_of, build, sample_lengths, trained_model
from measurements.gpu_steps import steps_of
from measurements.older_transformers import FIRST_VERSION, takes_features

MODES = ("Baseline", "fast")
PADDED = "padded"
WAYS = {"flex": "flex_attention", "flash": "flash_attention_2"}
"""Attention of packed rows, by its name in the columns."""
COLUMNS = tuple(f"{mode} {name}" for mode in MODES for name in ("padding", *(f"{way} s" for way in (PADDED, *WAYS))))


def packing_row(bench: Bench, row: str, cells: Cells) -> None:
    """Share of padding in a step, and its seconds with padded and with packed rows."""
    shape = bench.shapes[row]
    cells |= {f"{mode} padding": share_of_padding(shape, mode) for mode in MODES}
    model = bench.held.get(row) or trained(bench, shape)
    if not takes_features(model.vlm):
        cells |= {column: Reason(f"needs transformers {FIRST_VERSION}") for column in COLUMNS if column not in cells}
        return
    measure(bench, model, shape, PADDED, cells)
    text = model.config.get_text_config()
    before = text._attn_implementation
    for way, implementation in WAYS.items():
        if way == "flash" and find_spec("flash_attn") is None:
            cells |= {f"{mode} {way} s": Reason("flash-attn is not installed") for mode in MODES}
            continue
        text._attn_implementation = implementation
        try:
            measure(bench, model, shape, way, cells)
        finally:
            text._attn_implementation = before


def trained(bench: Bench, shape: Shape) -> DualSpeedModel:
    """Model of a row, where none is held."""
    bench.drop_models()
    return trained_model(build(shape, shape.depth, bench.device), "LoRA", shape.tiles > 1)


def share_of_padding(shape: Shape, mode: str) -> float:
    """Share of a padded batch's positions that hold no token."""
    batch = batch_of(shape, torch.device("cpu"))
    lengths = [fast if mode == "fast" else full for full, fast, _ in sample_lengths(shape, batch)]
    return 1 - sum(lengths) / (len(lengths) * max(lengths))


def measure(bench: Bench, model: DualSpeedModel, shape: Shape, way: str, cells: Cells) -> None:
    """Seconds of the steps with the present attention."""
    packs = way != PADDED
    with reasons(cells, [f"{mode} {way} s" for mode in MODES]):
        if packs:
            check_packing(model.vlm, bench.device)
        steps = steps_of(bench, model, shape, Objective(packs=packs))
        for mode in MODES:
            with reasons(cells, [f"{mode} {way} s"]):
                steps[mode]()  # warms up, and compiles flex attention
                seconds = [devices.timed(steps[mode], bench.device) for _ in range(bench.repeats)]
                cells[f"{mode} {way} s"] = statistics.median(seconds)
