"""Cost of a training step: ours beside steps written like the published implementation's.

    python -m measurements.train_step [--model small | small-qwen3-vl] [--rounds 7] [--out speed.json]

The models have random weights in their real shapes. All steps run on one batch, in one process and in turns, so that
other load on the machine affects all of them alike; the table shows medians. A step is forward, backward, gradient
clipping and AdamW for one global batch. Our steps use activation checkpointing only on full tokens, and compute logits
and losses at supervised positions. Plain steps are those of plain_step.py. `mixed` is (1 - r) fast + r slow, computed
from the medians; theory is the same formula on the FLOPs that torch counts in our steps. Peak memory is measured in a
separate process for each step.

A Qwen3-VL has steps with PixelPrune (`pixel_pruning: 0`, half of the pictures' squares are predicted) instead of the
plain ones, and the share of the vision tower, projector included, in its fast steps.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import torch
from torch import nn

from dualspeed import DualSpeedConfig
from dualspeed.device import machine, peak_memory_bytes
from dualspeed.method import fast_mode
from dualspeed.method.model import DualSpeedModel
from dualspeed.method.vlm import vision
from dualspeed.settings.modes import Mode
from dualspeed.training.micro_batches import micro_batches
from dualspeed.training.step_times import count_flops, time_pruner, timed
from dualspeed.training.trainable import set_trainable
from measurements import plain_step
from measurements.models import MODELS, Size, batch_of, build
from measurements.stopwatch import Stopwatch

SLOW_MODE_RATIO, PRUNING_RATIO = 0.1, 0.9
OURS = ("baseline", "baseline_unchecked", "naive", "fast", "slow")
PLAIN = ("plain_baseline", "plain_fast", "plain_slow")
PIXELS = ("pixels_fast", "pixels_slow")
"""Steps of a Qwen3-VL with PixelPrune."""
Step = Callable[[], None]


def main() -> None:
    """Print the table and the ratios that the project must reach."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="small", choices=sorted(MODELS))
    parser.add_argument("--rounds", type=int, default=7, help="timed repetitions of each step, after one warm-up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--cpu-time", action="store_true", help="measure CPU time instead of wall time, for shared machines"
    )
    parser.add_argument("--out", type=Path, help="write everything measured here, as JSON")
    options = parser.parse_args()
    size = MODELS[options.model]
    memory = {name: in_fresh_process(peak, name, size, options.threads) for name in steps_of(size)}
    measured = in_fresh_process(measure, size, options.threads, options.rounds, options.cpu_time)
    seconds = {name: statistics.median(values) for name, values in measured["seconds"].items()}
    print(
        f"{options.model} on {machine()}, torch {torch.__version__}, {options.threads} threads, batch {size.batch_size}"
    )
    print(table(seconds, measured, memory).to_markdown())
    summary = summarise(seconds, measured, memory)
    print("\n".join(f"{name}: {value:.3f}" for name, value in summary.items()))
    if options.out:
        options.out.write_text(json.dumps(measured | {"memory": memory, "summary": summary, "machine": machine()}))


def steps_of(size: Size) -> tuple[str, ...]:
    """Names of the steps that are measured."""
    return (*OURS, *(PIXELS if size.grid else PLAIN))


def in_fresh_process(function: Callable, *arguments):
    """Result of `function` in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def measure(size: Size, threads: int, rounds: int, cpu_time: bool) -> dict:
    """Seconds of each repetition of each step, FLOPs of each step, the pruner's seconds, and the batch size."""
    torch.set_num_threads(threads)
    models, steps = make_steps(size, steps_of(size))
    seconds = {name: [] for name in steps}
    in_pruner = []
    for round_number in range(rounds + 1):
        for name, step in steps.items():
            with time_pruner(models["fast"]) as pruner_seconds:
                elapsed = processor_time(step) if cpu_time else timed(step)
            if round_number > 0:
                seconds[name].append(elapsed)
                if name == "fast":
                    in_pruner.append(sum(pruner_seconds))
    batch = batch_of(size)
    return {
        "seconds": seconds,
        "pruner_seconds": statistics.median(in_pruner),
        "flops": {name: count_flops(step) for name, step in steps.items() if name not in PLAIN},
        "tower": {name: in_tower(steps[name], rounds) for name in ("fast", PIXELS[0]) if name in steps and size.grid},
        "tokens": int(batch["attention_mask"].sum()),
        "batch_size": size.batch_size,
        "matmul_flops_per_second": matmul_flops_per_second(),
    }


def in_tower(step: Step, rounds: int) -> dict[str, float]:
    """Shares of a step's seconds in vision tower and projector and in the choice of squares, and the tower's FLOPs."""
    shares = {"tower": [], "squares": []}
    for _ in range(rounds):
        watch = Stopwatch()
        with watch.on("tower", fast_mode, "encode_images"), watch.on("squares", vision, "prune_pixels"):
            elapsed = timed(step)
        for part, values in shares.items():
            values.append(watch.seconds[part] / elapsed)
    flops: list[int] = []
    encode = fast_mode.encode_images

    def counted(*arguments, **settings):
        flops.append(count_flops(lambda: encode(*arguments, **settings)))
        return encode(*arguments, **settings)

    with patch.object(fast_mode, "encode_images", counted):
        step()
    return {part: statistics.median(values) for part, values in shares.items()} | {"flops": sum(flops)}


def processor_time(call: Step) -> float:
    """CPU seconds that all threads of this process spend in a call; other processes don't count."""
    start = time.process_time()
    call()
    return time.process_time() - start


def peak(name: str, size: Size, threads: int) -> int:
    """Peak memory in bytes of this process after three steps of one kind."""
    torch.set_num_threads(threads)
    _, steps = make_steps(size, (name,))
    for _ in range(3):
        next(iter(steps.values()))()
    return peak_memory_bytes()


def make_steps(size: Size, names: tuple[str, ...]) -> tuple[dict[str, DualSpeedModel], dict[str, Step]]:
    """Models by name, and steps by name, which share weights and optimizer.

    The learning rate is 0; a step costs as much as with any other.
    """
    vlm = build(size)
    fast = DualSpeedModel(vlm, DualSpeedConfig(pruning_ratio=PRUNING_RATIO))
    set_trainable(fast, "finetune")
    naive = DualSpeedModel(vlm, DualSpeedConfig(pruning_ratio=PRUNING_RATIO, num_virtual_tokens=0))
    parameters = [parameter for parameter in fast.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)
    batch = batch_of(size)
    if (positions := fast.positions()) is not None:  # as from the collator
        batch["positions_3d"] = positions(batch["input_ids"], batch["attention_mask"], batch)
    fast.train()
    ours = {
        "baseline": partial(backward, fast, batch, size.baseline_batch_size, True, mode=Mode.SLOW, distill=False),
        "baseline_unchecked": partial(
            backward, fast, batch, size.baseline_batch_size, False, mode=Mode.SLOW, distill=False
        ),
        "naive": partial(backward, naive, batch, size.fast_batch_size, True, mode=Mode.FAST),
        "fast": partial(backward, fast, batch, size.fast_batch_size, True, mode=Mode.FAST),
        "slow": partial(backward, fast, batch, size.slow_batch_size, True, mode=Mode.SLOW),
    }
    if size.grid:
        pruned = DualSpeedModel(vlm, DualSpeedConfig(pruning_ratio=PRUNING_RATIO, pixel_pruning=0))
        pruned.mode_isolator = fast.mode_isolator
        ours |= {
            "pixels_fast": partial(backward, pruned, batch, size.fast_batch_size, True, mode=Mode.FAST),
            "pixels_slow": partial(backward, pruned, batch, size.slow_batch_size, True, mode=Mode.SLOW),
        }
    plain = {
        "plain_baseline": partial(plain_step.baseline, vlm, batch),
        "plain_fast": partial(plain_step.fast, vlm, fast.mode_isolator, batch, PRUNING_RATIO),
        "plain_slow": partial(plain_step.slow, vlm, fast.mode_isolator, batch, PRUNING_RATIO),
    }
    steps = {name: partial(optimised, run, optimizer, parameters) for name, run in (ours | plain).items()}
    return {"fast": fast}, {name: steps[name] for name in names}


def optimised(run: Step, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """Optimizer step: gradients by `run`, clipping, AdamW."""
    optimizer.zero_grad()
    run()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def backward(model: DualSpeedModel, batch: dict, micro_batch_size: int, checkpointing: bool, **mode) -> None:
    """Accumulate the gradients of one global batch in our model, micro-batch by micro-batch."""
    switch = model.activation_checkpointing_enable if checkpointing else model.activation_checkpointing_disable
    if model.is_activation_checkpointing is not checkpointing:
        switch()
    num_items = int((batch["labels"] != -100).sum())
    for part in micro_batches(batch, [1] * len(batch["input_ids"]), micro_batch_size):
        model(**part, **mode, num_items_in_batch=num_items).loss.backward()


def matmul_flops_per_second(size: int = 2048) -> float:
    """FLOPs per second of a square matrix product, an upper bound for any step."""
    matrix = torch.randn(size, size)
    return 2 * size**3 / min(timed(partial(torch.matmul, matrix, matrix)) for _ in range(5))


def table(seconds: dict[str, float], measured: dict, memory: dict[str, int]) -> pd.DataFrame:
    """Table with one row per step; MFU counts the FLOPs of our step without recomputation."""
    rate = measured["matmul_flops_per_second"]
    useful = measured["flops"] | {"baseline": measured["flops"]["baseline_unchecked"]}
    rows = {
        name: {
            "s": f"{value:.2f}",
            "samples/s": f"{measured['batch_size'] / value:.1f}",
            "tokens/s": f"{measured['tokens'] / value:.0f}",
            "MFU": f"{useful[name] / value / rate:.0%}" if name in useful and name != "slow" else "",
            "peak MiB": f"{memory[name] / 2**20:.0f}",
            "GPU": "not run",
        }
        for name, value in seconds.items()
    }
    return pd.DataFrame(rows).T


def mixed(fast: float | pd.Series, slow: float | pd.Series) -> float | pd.Series:
    """Mean over a run's steps; the share SLOW_MODE_RATIO of them is slow."""
    return (1 - SLOW_MODE_RATIO) * fast + SLOW_MODE_RATIO * slow


def summarise(seconds: dict[str, float], measured: dict, memory: dict[str, int]) -> dict[str, float]:
    """Ratios of plain to our time, measured and theoretical speedups, peak memory relative to Baseline."""
    flops, prefix = measured["flops"], "plain_"
    plain = {name.removeprefix(prefix): value for name, value in seconds.items() if name.startswith(prefix)}
    mixed_seconds, mixed_flops = (mixed(one["fast"], one["slow"]) for one in (seconds, flops))
    measured_speedup, theory = seconds["baseline"] / mixed_seconds, flops["baseline"] / mixed_flops
    summary = {f"{name}: plain over ours": value / seconds[name] for name, value in plain.items()}
    if plain:
        mixed_plain = mixed(plain["fast"], plain["slow"])
        summary["mixed: plain over ours"] = mixed_plain / mixed_seconds
        summary["speedup of plain mixed over plain baseline"] = plain["baseline"] / mixed_plain
    if PIXELS[0] in seconds:
        summary |= summarise_pixels(seconds, flops, measured["tower"])
    return {
        **summary,
        "speedup of fast over baseline": seconds["baseline"] / seconds["fast"],
        "speedup of mixed over baseline": measured_speedup,
        "the same by FLOPs": theory,
        "share of theory": measured_speedup / theory,
        "speedup of mixed over unchecked baseline": seconds["baseline_unchecked"] / mixed_seconds,
        "pruner's share of a fast step": measured["pruner_seconds"] / seconds["fast"],
        "peak memory of fast over baseline": memory["fast"] / memory["baseline"],
        "peak memory of slow over baseline": memory["slow"] / memory["baseline"],
    }


def summarise_pixels(seconds: dict[str, float], flops: dict[str, float], tower: dict[str, dict]) -> dict[str, float]:
    """Shares of the tower in fast steps without and with PixelPrune, and the speedup of mixed steps with it."""
    summary = {}
    for name, label in (("fast", "a fast step"), (PIXELS[0], "a fast step with PixelPrune")):
        summary[f"tower's share of {label}"] = tower[name]["tower"]
        summary[f"tower's share of {label} by FLOPs"] = tower[name]["flops"] / flops[name]
    mixed_seconds, mixed_flops = (mixed(one[PIXELS[0]], one[PIXELS[1]]) for one in (seconds, flops))
    speedup, theory = seconds["baseline"] / mixed_seconds, flops["baseline"] / mixed_flops
    return summary | {
        "choice of squares, share of a fast step with PixelPrune": tower[PIXELS[0]]["squares"],
        "speedup of fast with PixelPrune over baseline": seconds["baseline"] / seconds[PIXELS[0]],
        "speedup of mixed with PixelPrune over baseline": speedup,
        "the same by FLOPs, with PixelPrune": theory,
        "share of theory with PixelPrune": speedup / theory,
        "mixed without PixelPrune over with": mixed(seconds["fast"], seconds["slow"]) / mixed_seconds,
    }


if __name__ == "__main__":
    main()
