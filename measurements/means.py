"""Time and memory that each optimisation of a step saves by itself, for optimisations in use and rejected ones.

    python -m measurements.means [--rounds 5] [--out means.json]

Runs a step of train_step.py's `small` model with and without one optimisation in turns and takes medians; peak memory
is measured in a separate process. An optimisation is worth its code from 5 % of a step's time or memory on.
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from dualspeed.device import machine, peak_memory_bytes
from dualspeed.method.fast_mode import encode_batch
from dualspeed.method.losses import supervised_positions
from dualspeed.method.model import DualSpeedModel
from dualspeed.method.packing import packed_logits
from dualspeed.method.sequences import Sequences
from dualspeed.method.vlm.vision import EncodedImages
from dualspeed.settings.modes import Mode
from dualspeed.training.micro_batches import micro_batches
from dualspeed.training.step_times import timed
from measurements.models import MODELS, batch_of
from measurements.train_step import Step, backward, in_fresh_process, make_steps, optimised

SIZE = MODELS["small"]
# As workflow/rules/common.smk sets them.
KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**33)}


@dataclass(frozen=True)
class Optimisation:
    """An optimisation, and the step that it is measured in."""

    step: str
    """Name of a step, one of train_step.OURS."""
    with_it: Callable[[DualSpeedModel], AbstractContextManager] = lambda model: nullcontext()
    """Context that adds it to the step."""
    without_it: Callable[[DualSpeedModel], AbstractContextManager] = lambda model: nullcontext()
    """Context that removes it from the step."""
    is_used: bool = True
    micro_batch_without: int | None = None
    """Micro-batch size without it, where it is a choice of micro-batches."""


def main() -> None:
    """Print a table with one row per optimisation."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed repetitions of each step, after one warm-up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=sorted(OPTIMISATIONS), default=list(OPTIMISATIONS))
    parser.add_argument("--out", type=Path, help="write everything measured here, as JSON")
    options = parser.parse_args()
    rows = {name: measure(name, options.rounds, options.threads) for name in options.only}
    if options.only == list(OPTIMISATIONS):
        rows["batches grouped by pruned length"] = in_fresh_process(time_grouping, options.rounds, options.threads)
        rows["freed memory kept"] = time_malloc(options.rounds, options.threads)
    print(f"{machine()}, torch {torch.__version__}, {options.threads} threads, batch {SIZE.batch_size}")
    print(pd.DataFrame({name: formatted(row) for name, row in rows.items()}).T.fillna("").to_markdown())
    if options.out:
        options.out.write_text(json.dumps(rows))


def measure(name: str, rounds: int, threads: int) -> dict:
    """Seconds and peak memory of a step with and without an optimisation."""
    seconds = in_fresh_process(time_with_and_without, name, rounds, threads)
    peaks = {f"peak_{which}": in_fresh_process(peak, name, which, threads) for which in ("with", "without")}
    return {"step": OPTIMISATIONS[name].step, "is_used": OPTIMISATIONS[name].is_used} | seconds | peaks


def time_with_and_without(name: str, rounds: int, threads: int) -> dict[str, float]:
    """Median seconds with and without, run in turns."""
    torch.set_num_threads(threads)
    ways = both_ways(name)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for round_number in range(rounds + 1):
        for way, step in ways.items():
            elapsed = timed(step)
            if round_number > 0:
                seconds[way].append(elapsed)
    return {way: statistics.median(values) for way, values in seconds.items()}


def peak(name: str, which: str, threads: int) -> int:
    """Peak memory in bytes of this process after three steps."""
    torch.set_num_threads(threads)
    step = both_ways(name)[which]
    for _ in range(3):
        step()
    return peak_memory_bytes()


def both_ways(name: str) -> dict[str, Step]:
    """Whole step with an optimisation, and without it."""
    optimisation = OPTIMISATIONS[name]
    models, steps = make_steps(SIZE, (optimisation.step,))
    model, whole = models["fast"], steps[optimisation.step]
    run = whole.args[0]
    run_without = run
    if optimisation.micro_batch_without is not None:
        run_without = partial(run.func, *run.args[:2], optimisation.micro_batch_without, *run.args[3:], **run.keywords)

    def within(context: Callable[[DualSpeedModel], AbstractContextManager], run: Step) -> Step:
        def call() -> None:
            with context(model):
                optimised(run, *whole.args[1:])

        return call

    return {"with": within(optimisation.with_it, run), "without": within(optimisation.without_it, run_without)}


def formatted(row: dict) -> dict[str, str]:
    """Cells of a row of the table."""
    cells = {"step": row["step"], "in use": "yes" if row["is_used"] else "no"}
    cells |= {f"s {way}": f"{row[way]:.2f}" for way in ("without", "with")}
    cells["time saved"] = f"{1 - row['with'] / row['without']:.0%}"
    if "peak_with" in row:
        cells |= {f"MiB {way}": f"{row[f'peak_{way}'] / 2**20:.0f}" for way in ("without", "with")}
        cells["memory saved"] = f"{1 - row['peak_with'] / row['peak_without']:.0%}"
    return cells


def logits_everywhere(model: DualSpeedModel) -> AbstractContextManager:
    """Compute float32 logits at all positions and select the supervised ones afterwards."""

    def logits(vlm: PreTrainedModel, inputs: Sequences, images: ModelOutput | None) -> Tensor:
        output = vlm(**vlm_inputs(inputs, images))
        return output.logits.float()[supervised_positions(inputs.labels)]

    return patch("dualspeed.method.objective.supervised_logits", logits)


def vlm_inputs(inputs: Sequences, images: ModelOutput | None) -> dict:
    """Inputs of the stock forward, as DualSpeedModel passes them."""
    return {
        "input_ids": inputs.input_ids,
        "attention_mask": inputs.attention_mask,
        "mm_encoder_outputs": {} if images is None else {"image": images},
        "use_cache": False,
    }


def packed(model: DualSpeedModel) -> AbstractContextManager:
    """Pack all samples into one row, each with positions from 0; SDPA gets a mask that separates them."""
    return patch("dualspeed.method.objective.supervised_logits", packed_logits)


def encoded_twice(model: DualSpeedModel) -> AbstractContextManager:
    """Encode images for the teacher and again for the student."""

    def twice(model: DualSpeedModel, images: dict[str, Tensor], *grids: object) -> EncodedImages:
        encode_batch(model, images, *grids)
        return encode_batch(model, images, *grids)

    return patch("dualspeed.method.model.encode_batch", twice)


@contextmanager
def recomputed_in_fast_steps(model: DualSpeedModel) -> Iterator[None]:
    """Activation checkpointing in both modes."""
    # The model switches checkpointing off in fast steps only for layers on its list.
    with (
        patch.object(model, "_checkpointed_layers", []),
        patch.object(type(model), "is_activation_checkpointing", True),
    ):
        model.vlm.get_decoder().activation_checkpointing_enable()
        yield
    model.activation_checkpointing_enable()


@contextmanager
def compiled(model: DualSpeedModel) -> Iterator[None]:
    """Compile each layer of the language model."""
    layers = model.vlm.get_decoder().layers
    for layer in layers:
        if not hasattr(layer, "compiled_once"):
            layer.compile()
            layer.compiled_once = layer._compiled_call_impl
        layer._compiled_call_impl = layer.compiled_once
    yield
    for layer in layers:
        layer._compiled_call_impl = None


OPTIMISATIONS = {
    "logits at supervised positions alone": Optimisation("baseline", without_it=logits_everywhere),
    "images encoded once": Optimisation("slow", without_it=encoded_twice),
    "no vision layer after the selected one": Optimisation(
        "fast",
        without_it=lambda model: patch(
            "dualspeed.method.vlm.vision.skip_unused_vision_layers", lambda vlm: nullcontext({})
        ),
    ),
    "no recomputation in fast steps": Optimisation("fast", without_it=recomputed_in_fast_steps),
    "fast steps in larger parts than slow ones": Optimisation("fast", micro_batch_without=SIZE.slow_batch_size),
    "gradients of the losses with their values": Optimisation(
        "slow",
        without_it=lambda model: patch(
            "dualspeed.method.losses.sum_over_chunks", lambda summed, logits, targets: summed(logits.float(), targets)
        ),
    ),
    "no attention mask where padding is behind": Optimisation(
        "baseline",
        without_it=lambda model: patch(
            "dualspeed.method.logits.mask_for_attention", lambda inputs: inputs.attention_mask
        ),
    ),
    "packing, fast": Optimisation("fast", with_it=packed, is_used=False),
    "packing, Baseline": Optimisation("baseline", with_it=packed, is_used=False),
    "torch.compile of the layers, fast": Optimisation("fast", with_it=compiled, is_used=False),
    "torch.compile of the layers, Baseline": Optimisation("baseline", with_it=compiled, is_used=False),
    "bfloat16 by autocast, fast": Optimisation(
        "fast", with_it=lambda model: torch.autocast("cpu", torch.bfloat16), is_used=False
    ),
}
"""Optimisations that can be switched within a process; grouping and malloc settings are measured by `main`."""


def time_grouping(rounds: int, threads: int, num_batches: int = 4) -> dict:
    """Fast steps on texts with lengths like instruction data's, in batches of similar length and in random ones."""
    torch.set_num_threads(threads)
    models, steps = make_steps(SIZE, ("fast",))
    model, whole = models["fast"], steps["fast"]
    drawn = batch_of(replace(SIZE, batch_size=num_batches * SIZE.batch_size, spread=0.6))
    by_length = drawn["attention_mask"].sum(dim=1).argsort()
    orders = {"with": by_length, "without": torch.arange(len(by_length))}

    def steps_over(order: Tensor) -> None:
        ordered = {name: values[order] for name, values in drawn.items()}
        for batch in micro_batches(ordered, [1] * len(order), SIZE.batch_size):
            run = partial(backward, model, to_longest(batch), SIZE.fast_batch_size, True, mode=Mode.FAST)
            optimised(run, *whole.args[1:])

    seconds: dict[str, list[float]] = {way: [] for way in orders}
    for _ in range(rounds):
        for way, order in orders.items():
            seconds[way].append(timed(partial(steps_over, order)) / num_batches)
    return {"step": "fast", "is_used": True} | {way: statistics.median(values) for way, values in seconds.items()}


def to_longest(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cut off the columns that are padding in every sample."""
    length = int(batch["attention_mask"].sum(dim=1).max())
    return {name: values if name == "pixel_values" else values[:, :length] for name, values in batch.items()}


def time_malloc(rounds: int, threads: int) -> dict:
    """Fast steps in processes whose malloc keeps freed memory, and in ones that return it to the system."""
    seconds = {}
    for way, variables in {"without": {}, "with": KEEP_FREED_MEMORY}.items():
        with patch.dict(os.environ, variables):
            seconds[way] = in_fresh_process(time_steps, "fast", rounds, threads)
    return {"step": "fast", "is_used": True} | seconds


def time_steps(step: str, rounds: int, threads: int) -> float:
    """Median seconds of a step in this process."""
    torch.set_num_threads(threads)
    _, steps = make_steps(SIZE, (step,))
    return statistics.median([timed(steps[step]) for _ in range(rounds + 1)][1:])


if __name__ == "__main__":
    main()
