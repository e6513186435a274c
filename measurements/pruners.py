"""Cost of each pruner: time, peak memory, and share of a fast training step of a 7B model.

    python -m measurements.pruners [--device cpu] [--shapes 16x576x4096 4x2880x4096] [--repeats 9]

Two forms of each method are measured: our pruner, which prunes the batch at once, and the published algorithm, image by
image (published.py). They are timed alternately, so that other load on the machine slows both alike; times are medians
after one warm-up turn. Peak memory is that of one call in its own process. No weights are needed: features are random,
and the time of a fast step is its FLOPs at the rate of a large bfloat16 (CPU: float32) matrix product on the same
device, which no real step reaches, so that shares are upper bounds.
"""

import argparse
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import pandas as pd
import torch

from dualspeed.device import best_device, machine, peak_memory_bytes, synchronize
from dualspeed.pruners import PRUNERS, VisualTokens, num_tokens_to_keep
from dualspeed.settings.names import PRUNER_LABELS
from measurements import published
from measurements.random_tokens import random_tokens

PRUNING_RATIO = 0.9
TEXT_TOKENS, ISOLATOR_TOKENS = 128, 4
LLM_PARAMETERS, TOWER_PARAMETERS = 6.7e9, 0.3e9
BYTES_PER_MIB = 2**20

Result = TypeVar("Result")


def main() -> None:
    """Print one table per shape."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default=best_device().type)
    parser.add_argument("--shapes", nargs="+", default=["16x576x4096", "4x2880x4096"], help="images x tokens x width")
    parser.add_argument("--pruners", nargs="+", default=sorted(PRUNERS), choices=sorted(PRUNERS))
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    print(f"{machine(torch.device(options.device))}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads")
    for text in options.shapes:
        batch_size, num_tokens, width = (int(size) for size in text.split("x"))
        step = fast_step_seconds(options.device, batch_size, num_tokens)
        print(f"\n{text}, p = {PRUNING_RATIO}: a fast step takes {step * 1e3:.0f} ms or more")
        shape = (batch_size, num_tokens, width)
        rows = [row(name, shape, options.device, options.repeats, step) for name in options.pruners]
        print(pd.DataFrame(rows).to_markdown(index=False))


def row(name: str, shape: tuple[int, int, int], device: str, repeats: int, step: float) -> dict[str, str]:
    """Row of the table for one pruner; `step` is the time of a fast step in seconds."""
    memory, loop_memory = (in_own_process(peak_of_one_call, form, name, shape, device) for form in FORMS)
    batched, loop = in_own_process(seconds_of_forms, name, shape, device, repeats)
    return {
        "pruner": PRUNER_LABELS[name],
        "ms": f"{batched * 1e3:.1f}",
        "loop ms": f"{loop * 1e3:.1f}",
        "faster by": f"{loop / batched:.1f}x",
        "peak MiB": f"{memory / BYTES_PER_MIB:.0f}",
        "loop peak MiB": f"{loop_memory / BYTES_PER_MIB:.0f}",
        "share of a fast step": f"{batched / step:.2%}",
    }


def in_own_process(function: Callable[..., Result], *arguments: object) -> Result:
    """Call `function` in a new process and return its result."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def clip_tokens(shape: tuple[int, int, int], device: str) -> VisualTokens:
    """Random tokens of a CLIP tower, which has no merger: in both forms, centred methods compare projected features."""
    return replace(random_tokens(*shape, device), before_merger=None)


def peak_of_one_call(form: str, name: str, shape: tuple[int, int, int], device: str) -> float:
    """Peak memory in bytes, without the inputs."""
    tokens, num_keep = clip_tokens(shape, device), num_tokens_to_keep(shape[1], PRUNING_RATIO)
    before = forget_peak(torch.device(device))
    FORMS[form](name, tokens, num_keep)
    return new_peak(torch.device(device)) - before


def forget_peak(device: torch.device) -> int:
    """Bytes that are in use now; making the inputs needed more, which later peaks would hide behind."""
    gc.collect()
    if device.type != "cpu":
        torch.get_device_module(device).reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is what is resident now
    return new_peak(device)


def new_peak(device: torch.device) -> int:
    """Peak bytes since `forget_peak`, of the device or of this process."""
    if device.type != "cpu":
        return peak_memory_bytes(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def seconds_of_forms(name: str, shape: tuple[int, int, int], device: str, repeats: int) -> list[float]:
    """Median seconds of each of FORMS, timed alternately."""
    tokens, num_keep = clip_tokens(shape, device), num_tokens_to_keep(shape[1], PRUNING_RATIO)
    calls = [partial(prune, name, tokens, num_keep) for prune in FORMS.values()]
    turns = [[timed(call, device) for call in calls] for _ in range(repeats + 1)]
    return [statistics.median(seconds) for seconds in zip(*turns[1:], strict=True)]


@torch.no_grad()
def batched_form(name: str, tokens: VisualTokens, num_keep: int) -> None:
    """Prune the batch with our pruner."""
    PRUNERS[name](tokens, torch.full((len(tokens.features),), num_keep))


@torch.no_grad()
def loop_form(name: str, tokens: VisualTokens, num_keep: int) -> None:
    """Prune image by image with the published algorithm."""
    algorithm = getattr(published, name)
    for image in zip(*(tokens.require(field) for field in published.fields_of(algorithm)), strict=True):
        algorithm(*image, num_keep)


FORMS = {"batched": batched_form, "loop": loop_form}


def fast_step_seconds(device: str, batch_size: int, num_tokens: int) -> float:
    """Seconds of a fast step of a 7B model with a CLIP-L tower.

    The language model's forward and backward take 6 FLOPs per parameter and token (kept tokens, isolator and text), the
    tower's forward 2; attention is left out.
    """
    kept = num_tokens_to_keep(num_tokens, PRUNING_RATIO) + ISOLATOR_TOKENS + TEXT_TOKENS
    flops = batch_size * (6 * LLM_PARAMETERS * kept + 2 * TOWER_PARAMETERS * num_tokens)
    return flops / matmul_flops_per_second(device)


def matmul_flops_per_second(device: str, size: int = 4096) -> float:
    """FLOPs per second of a square matrix product."""
    matrix = torch.randn(size, size, device=device, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
    multiply = partial(torch.matmul, matrix, matrix)
    multiply()
    return 2 * size**3 / statistics.median(timed(multiply, device) for _ in range(5))


def timed(call: Callable[[], object], device: str) -> float:
    """Seconds of one call, including the device's work."""
    synchronize(torch.device(device))
    start = time.perf_counter()
    call()
    synchronize(torch.device(device))
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
