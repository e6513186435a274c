"""What each means of making a step faster or smaller gives by itself, and what those that were left out would.

    python -m measurements.means [--rounds 5] [--out means.json]

On the `small` model of train_step.py: the step with and without one means, in turns, medians; peak memory is that of a
process of its own. A means is worth its code from 5 % of a step's time or memory on.
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

from dualspeed.method.losses import supervised_positions
from dualspeed.method.model import DualSpeedModel
from dualspeed.method.sequences import Sequences
from dualspeed.settings.modes import Mode
from dualspeed.training.micro_batches import micro_batches
from dualspeed.training.step_times import machine, peak_memory_bytes, timed
from measurements.models import MODELS, batch_of
from measurements.train_step import Step, backward, in_fresh_process, make_steps, optimised

SIZE = MODELS["small"]
# As workflow/rules/common.smk sets them.
KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**33)}


@dataclass(frozen=True)
class Means:
    """One way to save, and the step it is measured in."""

    step: str
    """A step of train_step.OURS."""
    with_it: Callable[[DualSpeedModel], AbstractContextManager] = lambda model: nullcontext()
    without_it: Callable[[DualSpeedModel], AbstractContextManager] = lambda model: nullcontext()
    is_used: bool = True
    micro_batch_without: int | None = None
    """Samples at once otherwise."""


def main() -> None:
    """Print one row a means."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="how often each step is timed, after one to warm up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=sorted(MEANS), default=list(MEANS))
    parser.add_argument("--out", type=Path, help="write everything measured here, as JSON")
    options = parser.parse_args()
    rows = {name: measure(name, options.rounds, options.threads) for name in options.only}
    if options.only == list(MEANS):
        rows["batches grouped by pruned length"] = in_fresh_process(time_grouping, options.rounds, options.threads)
        rows["freed memory kept"] = time_malloc(options.rounds, options.threads)
    print(f"{machine()}, torch {torch.__version__}, {options.threads} threads, batch {SIZE.batch_size}")
    print(pd.DataFrame({name: formatted(row) for name, row in rows.items()}).T.fillna("").to_markdown())
    if options.out:
        options.out.write_text(json.dumps(rows))


def measure(name: str, rounds: int, threads: int) -> dict:
    """Seconds and peak memory of a step with and without a means."""
    seconds = in_fresh_process(time_with_and_without, name, rounds, threads)
    peaks = {f"peak_{which}": in_fresh_process(peak, name, which, threads) for which in ("with", "without")}
    return {"step": MEANS[name].step, "is_used": MEANS[name].is_used} | seconds | peaks


def time_with_and_without(name: str, rounds: int, threads: int) -> dict[str, float]:
    """Medians of both ways in turns."""
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
    """Peak memory of this process after three steps."""
    torch.set_num_threads(threads)
    step = both_ways(name)[which]
    for _ in range(3):
        step()
    return peak_memory_bytes()


def both_ways(name: str) -> dict[str, Step]:
    """The whole step with a means and without it."""
    means = MEANS[name]
    models, steps = make_steps(SIZE, (means.step,))
    model, whole = models["fast"], steps[means.step]
    run = whole.args[0]
    run_without = run
    if means.micro_batch_without is not None:
        run_without = partial(run.func, *run.args[:2], means.micro_batch_without, *run.args[3:], **run.keywords)

    def within(context: Callable[[DualSpeedModel], AbstractContextManager], run: Step) -> Step:
        def call() -> None:
            with context(model):
                optimised(run, *whole.args[1:])

        return call

    return {"with": within(means.with_it, run), "without": within(means.without_it, run_without)}


def formatted(row: dict) -> dict[str, str]:
    """A row of the table."""
    cells = {"step": row["step"], "in use": "yes" if row["is_used"] else "no"}
    cells |= {f"s {way}": f"{row[way]:.2f}" for way in ("without", "with")}
    cells["time saved"] = f"{1 - row['with'] / row['without']:.0%}"
    if "peak_with" in row:
        cells |= {f"MiB {way}": f"{row[f'peak_{way}'] / 2**20:.0f}" for way in ("without", "with")}
        cells["memory saved"] = f"{1 - row['peak_with'] / row['peak_without']:.0%}"
    return cells


def logits_everywhere(model: DualSpeedModel) -> AbstractContextManager:
    """Logits at all positions, in float32, of which the supervised ones are taken afterwards."""

    def logits(inputs: Sequences, images) -> Tensor:
        output = model.vlm(**vlm_inputs(inputs, images))
        return output.logits.float()[supervised_positions(inputs.labels)]

    return patch.object(model, "_logits", logits)


def vlm_inputs(inputs: Sequences, images) -> dict:
    """What the stock forward takes, as DualSpeedModel gives it."""
    return {
        "input_ids": inputs.input_ids,
        "attention_mask": inputs.attention_mask,
        "mm_encoder_outputs": {} if images is None else {"image": images},
        "use_cache": False,
    }


def packed(model: DualSpeedModel) -> AbstractContextManager:
    """All samples in one row, positions starting anew; under SDPA a mask keeps them apart."""

    def logits(inputs: Sequences, images) -> Tensor:
        is_token = inputs.attention_mask.bool()
        lengths = is_token.sum(dim=1).tolist()
        row = vlm_inputs(inputs, images) | {"input_ids": inputs.input_ids[is_token][None], "attention_mask": None}
        position_ids = torch.cat([torch.arange(length) for length in lengths])[None].to(is_token.device)
        positions = supervised_positions(inputs.labels)[is_token][None]
        return model.vlm(**row, position_ids=position_ids, logits_to_keep=positions).logits

    return patch.object(model, "_logits", logits)


def encoded_twice(model: DualSpeedModel) -> AbstractContextManager:
    """Images encoded once for the teacher and once more for the student."""
    encode = model._encode

    def twice(images: dict[str, Tensor]):
        encode(images)
        return encode(images)

    return patch.object(model, "_encode", twice)


@contextmanager
def recomputed_in_fast_steps(model: DualSpeedModel) -> Iterator[None]:
    """Activation checkpointing whatever the mode."""
    # Layers that the model doesn't know to recompute stay as they are in fast steps.
    with patch.object(model, "_recomputed", []), patch.object(type(model), "is_activation_checkpointing", True):
        model.vlm.get_decoder().activation_checkpointing_enable()
        yield
    model.activation_checkpointing_enable()


@contextmanager
def compiled(model: DualSpeedModel) -> Iterator[None]:
    """Each layer of the language model compiled."""
    layers = model.vlm.get_decoder().layers
    for layer in layers:
        if not hasattr(layer, "compiled_once"):
            layer.compile()
            layer.compiled_once = layer._compiled_call_impl
        layer._compiled_call_impl = layer.compiled_once
    yield
    for layer in layers:
        layer._compiled_call_impl = None


MEANS = {
    "logits at supervised positions alone": Means("baseline", without_it=logits_everywhere),
    "images encoded once": Means("slow", without_it=encoded_twice),
    "no vision layer after the selected one": Means(
        "fast",
        without_it=lambda model: patch(
            "dualspeed.method.vlm.vision.skip_unused_vision_layers", lambda vlm: nullcontext({})
        ),
    ),
    "no recomputation in fast steps": Means("fast", without_it=recomputed_in_fast_steps),
    "fast steps in larger parts than slow ones": Means("fast", micro_batch_without=SIZE.slow_batch_size),
    "slow steps in smaller parts than Baseline's": Means("slow", micro_batch_without=SIZE.baseline_batch_size),
    "no attention mask where padding is behind": Means(
        "baseline",
        without_it=lambda model: patch(
            "dualspeed.method.model.mask_for_attention", lambda inputs: inputs.attention_mask
        ),
    ),
    "packing, fast": Means("fast", with_it=packed, is_used=False),
    "packing, Baseline": Means("baseline", with_it=packed, is_used=False),
    "torch.compile of the layers, fast": Means("fast", with_it=compiled, is_used=False),
    "torch.compile of the layers, Baseline": Means("baseline", with_it=compiled, is_used=False),
    "bfloat16 by autocast, fast": Means(
        "fast", with_it=lambda model: torch.autocast("cpu", torch.bfloat16), is_used=False
    ),
}
"""Everything that is switched in one process; what decides batches or the process itself is measured apart."""


def time_grouping(rounds: int, threads: int, num_batches: int = 4) -> dict:
    """Fast steps over texts whose lengths spread as instruction data's do, in batches of like length and as drawn."""
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
    """Without the columns that are padding in every sample."""
    length = int(batch["attention_mask"].sum(dim=1).max())
    return {name: values if name == "pixel_values" else values[:, :length] for name, values in batch.items()}


def time_malloc(rounds: int, threads: int) -> dict:
    """Fast steps in processes that keep what is freed, and in ones that give it back."""
    seconds = {}
    for way, variables in {"without": {}, "with": KEEP_FREED_MEMORY}.items():
        with patch.dict(os.environ, variables):
            seconds[way] = in_fresh_process(time_steps, "fast", rounds, threads)
    return {"step": "fast", "is_used": True} | seconds


def time_steps(step: str, rounds: int, threads: int) -> float:
    """Median seconds of one kind of step in this process."""
    torch.set_num_threads(threads)
    _, steps = make_steps(SIZE, (step,))
    return statistics.median([timed(steps[step]) for _ in range(rounds + 1)][1:])


if __name__ == "__main__":
    main()
