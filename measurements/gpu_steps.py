"""Training steps of measurements/gpu.py: seconds, memory and utilisation of Baseline's, fast and slow steps.

A step is forward, backward, clipping and AdamW for one global batch, in micro-batches as a recipe would have them: fast
steps take the batch at once, the others a part of it with activation checkpointing. Trained weights, their gradients
and AdamW's moments are float32 under bfloat16 autocast, as the trainer has them; frozen weights are bfloat16. A model
that doesn't fit is measured at two depths of its language model, and the line through them gives the whole model's.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dualspeed.method.fast_mode import observe_pruning
from dualspeed.method.model import DualSpeedModel
from dualspeed.method.objective import Objective
from dualspeed.method.vlm.parts import parameter_parts
from dualspeed.settings.modes import Mode
from dualspeed.training.micro_batches import micro_batches
from measurements import gpu_device as devices
from measurements.gpu_cells import OUT_OF_MEMORY, Bench, Cells, Reason, memory_cell, reasons
from measurements.gpu_models import Shape, adapter_rank, batch_of, build, sample_lengths, trained_model
from measurements.older_transformers import let_take_features, takes_features

MODES: dict[str, dict[str, Any]] = {
    "Baseline": {"mode": Mode.SLOW, "distill": False},
    "fast": {"mode": Mode.FAST},
    "slow": {"mode": Mode.SLOW},
}
SLOW_MODE_RATIO = 0.1
SPARE_BYTES = 10 * 2**30
"""Room for activations beside weights, gradients and moments."""
COLUMNS = (
    "layers",
    *(f"{mode} s" for mode in MODES),
    *(f"{mode} GiB" for mode in MODES),
    "MFU Baseline",
    "MFU fast",
    "fast samples/s",
    "pruner",
    "speedup",
    "limit",
)


def train_row(bench: Bench, row: str, cells: Cells) -> None:
    """Cells of a model, trained in whole or by LoRA."""
    name, kind = row.split(", ")
    shape = bench.shapes[name]
    sizes = count(shape, kind)
    depths = [shape.depth]
    if fits(bench, sizes):
        cells |= measure_at(bench, name, kind, shape.depth)
    if not cells or Reason(OUT_OF_MEMORY) in seconds_of(cells):
        depths = [shape.depth // 4, shape.depth // 2]
        cells |= through_line(depths, [measure_at(bench, name, kind, depth) for depth in depths], shape.depth)
    cells["layers"] = str(shape.depth) if len(depths) == 1 else f"{depths[0]} and {depths[1]}, for {shape.depth}"
    cells |= rates(bench, shape, kind, sizes, cells)


def seconds_of(cells: Cells) -> list[float | str | Reason]:
    """Times in a row, or their reasons."""
    return [cells[f"{mode} s"] for mode in MODES]


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters of a whole model."""

    language: int
    vision: int
    head: int
    trained: int
    total: int


def count(shape: Shape, kind: str) -> Sizes:
    """Count parameters on a model without storage."""
    vlm = build(shape, shape.depth, torch.device("meta"))
    parts = parameter_parts(vlm)
    by_part = {part: sum(value.numel() for value, its in parts.items() if its == part) for part in set(parts.values())}
    blocks = vlm.get_decoder().layers
    adapters = sum(
        adapter_rank(module) * (module.in_features + module.out_features)
        for module in blocks.modules()
        if isinstance(module, torch.nn.Linear)
    )
    total = sum(value.numel() for value in vlm.parameters())
    vision = by_part.get("vision", 0)
    full = total - vision - by_part.get("unused", 0)
    return Sizes(
        language=sum(value.numel() for value in blocks.parameters()),
        vision=vision,
        head=vlm.get_output_embeddings().weight.numel(),
        trained=by_part.get("projector", 0) + adapters if kind == "LoRA" else full,
        total=total + (adapters if kind == "LoRA" else 0),
    )


def fits(bench: Bench, sizes: Sizes) -> bool:
    """True if the memory holds weights, gradients, moments and bfloat16 copies of what is trained, and some room."""
    if bench.memory_bytes is None:
        return True
    spare = 0 if bench.is_toy else SPARE_BYTES
    return 18 * sizes.trained + 2 * (sizes.total - sizes.trained) + spare <= bench.memory_bytes


def measure_at(bench: Bench, name: str, kind: str, depth: int) -> Cells:
    """Times and memory of a model with this number of layers; a whole LoRA model is kept for later parts."""
    cells: Cells = {}
    shape = bench.shapes[name]
    columns = [f"{mode} {unit}" for mode in MODES for unit in ("s", "GiB")] + ["pruner"]
    bench.drop_models()
    with reasons(cells, columns):
        vlm = build(shape, depth, bench.device)
        if not takes_features(vlm):
            let_take_features(vlm)
        model = trained_model(vlm, kind, shape.tiles > 1)
        steps = steps_of(bench, model, shape)
        for mode, step in steps.items():
            with reasons(cells, [f"{mode} s", f"{mode} GiB"]):
                cells[f"{mode} GiB"] = memory_cell(bench, step)  # the first call warms up
                cells[f"{mode} s"] = statistics.median(devices.timed(step, bench.device) for _ in range(bench.repeats))
        cells["pruner"] = pruner_seconds(bench, model, steps["fast"])
        if kind == "LoRA" and depth == shape.depth:
            model.zero_grad()
            bench.held[name] = model
    if kind != "LoRA":
        bench.drop_models()
    return cells


def steps_of(
    bench: Bench, model: DualSpeedModel, shape: Shape, objective: Objective | None = None
) -> dict[str, Callable[[], None]]:
    """Step of each mode, on one batch that is on the device already; the learning rate is 0."""
    objective = objective or Objective()
    batch = batch_of(shape, bench.device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    is_fused = bench.device.type in ("cpu", "cuda", "xpu")
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=is_fused)
    num_items = sum(supervised for _, _, supervised in sample_lengths(shape, batch))

    def step(mode: str) -> None:
        size = shape.samples if mode == "fast" else shape.full_samples
        optimizer.zero_grad()
        for part in micro_batches(batch, [1] * shape.samples, size):
            with devices.bfloat16(bench.device):
                loss = model(**part, **MODES[mode], num_items_in_batch=num_items, objective=objective).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return {mode: partial(step, mode) for mode in MODES}


def pruner_seconds(bench: Bench, model: DualSpeedModel, fast_step: Callable[[], None]) -> float:
    """Seconds that the pruner takes in a fast step, measured with waits before and after it."""
    found: list[float] = []

    def time_call(prune: Callable[[], Any], _: Any) -> Any:
        results: list[Any] = []
        found.append(devices.timed(lambda: results.append(prune()), bench.device))
        return results[0]

    with observe_pruning(model, time_call):
        fast_step()
    return sum(found)


NO_SLOPE = "no larger at the second depth than at the first: other work disturbs the machine"


def through_line(depths: list[int], measured: list[Cells], depth: int) -> Cells:
    """Cells at another depth, by the line through two."""
    (first, second), (low, high) = measured, depths
    cells: Cells = {}
    for column, a in first.items():
        b = second[column]
        if column == "pruner" and isinstance(b, float):
            cells[column] = b  # it costs the same at any depth
        elif isinstance(a, float) and isinstance(b, float):
            slope = (b - a) / (high - low)
            cells[column] = a + slope * (depth - low) if slope > 0 else Reason(NO_SLOPE)
        else:
            cells[column] = a if isinstance(a, Reason) else b
    return cells


def rates(bench: Bench, shape: Shape, kind: str, sizes: Sizes, cells: Cells) -> Cells:
    """Cells that follow from the times: utilisation, samples a second, the pruner's share, speedup and its limit."""
    batch = batch_of(shape, torch.device("cpu"))
    flops = {mode: useful_flops(shape, kind, sizes, sample_lengths(shape, batch), mode) for mode in MODES}
    peak = devices.peak_flops(bench.device)
    found: Cells = {}
    for mode in ("Baseline", "fast"):
        time = cells[f"{mode} s"]
        if isinstance(time, float) and peak:
            found[f"MFU {mode}"] = flops[mode] / time / peak
        else:
            unknown = Reason(f"no data-sheet rate known of {devices.name_of(bench.device)}")
            found[f"MFU {mode}"] = time if isinstance(time, Reason) else unknown
    baseline, fast, slow = seconds_of(cells)
    bench.held[f"{shape.config} {kind} fast samples/s"] = found["fast samples/s"] = over(shape.samples, fast)
    found["pruner"] = over(cells["pruner"], fast)
    mixed = mix(fast, slow)
    found["speedup"] = over(baseline, mixed)
    found["limit"] = flops["Baseline"] / float(mix(flops["fast"], flops["slow"]))  # type: ignore[arg-type]
    return found


def over(above: float | str | Reason, below: float | str | Reason) -> float | Reason:
    """Quotient, or the reason of the operand that has none."""
    for value in (above, below):
        if isinstance(value, Reason):
            return value
    return float(above) / float(below)


def mix(fast: float | str | Reason, slow: float | str | Reason) -> float | Reason:
    """Mean over a run's steps; the share SLOW_MODE_RATIO of them is slow."""
    for value in (fast, slow):
        if isinstance(value, Reason):
            return value
    return (1 - SLOW_MODE_RATIO) * float(fast) + SLOW_MODE_RATIO * float(slow)


def useful_flops(shape: Shape, kind: str, sizes: Sizes, lengths: list[tuple[int, int, int]], mode: str) -> float:
    """FLOPs of a step without recomputation: 2 a multiply-add, attention over all pairs of tokens.

    The backward pass costs twice the forward's where weights are trained, else once; the tower's attention is left out.
    """
    passes = 2 if kind == "LoRA" else 3
    vision = 2 * sizes.vision * shape.visual_tokens * (4 if "depth" in shape.vision else 1)
    heads = shape.text["num_attention_heads"]
    width = heads * shape.text.get("head_dim", shape.text["hidden_size"] // heads)

    def language(tokens: int, supervised: int) -> tuple[float, float]:
        return 2 * (sizes.language * tokens + sizes.head * supervised), 4 * tokens**2 * width * shape.depth

    total = 0.0
    for full, fast, supervised in lengths:
        linear, attention = language(fast if mode == "fast" else full, supervised)
        total += vision + passes * linear + 3 * attention
        if mode == "slow":
            total += sum(language(fast, supervised))
    return total
