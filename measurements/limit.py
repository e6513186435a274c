"""Share of the FLOP limit that mixed steps reach, and where the rest of their time goes.

    python -m measurements.limit [--model small] [--runs 5] [--rounds 5]

The limit of a step is Baseline's seconds times the step's share of Baseline's FLOPs, as in train_step.py, whose steps
these are. Each run is a process of its own, keeps freed memory as the workflow's jobs do, and times all steps in turns.
What a mixed step takes beyond its limit is divided into:

- the optimizer: clipping and AdamW take as long as in a Baseline step and have next to no FLOPs, so that the limit
  grants a mixed step only a part of that time;
- the pruner, whose FLOPs are few, in fast steps and before the teacher's pass;
- the rest of fast and of slow steps: matrix products of fewer rows, losses, and what else runs at fewer FLOPs a second.

A second table has what a slow step takes, in time and memory, by the samples of its micro-batches.
"""

import argparse
import dataclasses
import os
import statistics

import pandas as pd
import torch

from dualspeed.device import machine
from dualspeed.training.step_times import count_flops, time_pruner, timed
from measurements.means import KEEP_FREED_MEMORY
from measurements.models import MODELS, Size
from measurements.stopwatch import Stopwatch
from measurements.train_step import SLOW_MODE_RATIO, Step, in_fresh_process, make_steps, mixed, peak

SHARES = {"fast": 1 - SLOW_MODE_RATIO, "slow": SLOW_MODE_RATIO}


def main() -> None:
    """Print a row a run and their medians, then slow steps by the size of their micro-batches."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="small", choices=sorted(MODELS))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5, help="timed repetitions of each step in a run")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    size = MODELS[options.model]
    os.environ.update(KEEP_FREED_MEMORY)  # read by the processes that are started from here
    rows = [in_fresh_process(account, size, options.threads, options.rounds) for _ in range(options.runs)]
    table = pd.DataFrame(rows, index=map(str, range(1, len(rows) + 1))).rename_axis("run")
    table.loc["median"] = table.median()
    print(f"{options.model} on {machine()}, torch {torch.__version__}, {options.threads} threads")
    print(table.to_markdown(floatfmt=".3f"))
    print(slow_steps(size, options.threads, options.rounds).to_markdown(floatfmt=".3f"))


def account(size: Size, threads: int, rounds: int) -> dict[str, float]:
    """Limit of a mixed step in seconds, the share of it that is reached, and seconds beyond it by their reason."""
    torch.set_num_threads(threads)
    models, steps = make_steps(size, ("baseline", *SHARES))
    flops = {name: count_flops(step) for name, step in steps.items()}  # warms up too
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    pruner: dict[str, list[float]] = {name: [] for name in steps}
    update = []
    for _ in range(rounds):
        for name, step in steps.items():
            with time_pruner(models["fast"]) as in_pruner:
                seconds[name].append(timed(step))
            pruner[name].append(sum(in_pruner))
        update.append(seconds_of_update(steps["fast"]))
    times, prunes = ({name: statistics.median(values) for name, values in one.items()} for one in (seconds, pruner))
    granted = {name: flops[name] / flops["baseline"] for name in SHARES}
    limit = times["baseline"] * mixed(granted["fast"], granted["slow"])
    taken = mixed(times["fast"], times["slow"])
    rest = {}
    for name, share in SHARES.items():
        optimizer = statistics.median(update) * (1 - granted[name])
        beyond = times[name] - times["baseline"] * granted[name]
        rest[name] = share * (beyond - optimizer - prunes[name])
    return {
        "Baseline, s": times["baseline"],
        "mixed, s": taken,
        "limit, s": limit,
        "share": limit / taken,
        "optimizer, s": statistics.median(update) * (1 - mixed(granted["fast"], granted["slow"])),
        "pruner, s": mixed(prunes["fast"], prunes["slow"]),
        "rest of fast, s": rest["fast"],
        "rest of slow, s": rest["slow"],
    }


def seconds_of_update(step: Step) -> float:
    """Seconds of a step's clipping and AdamW."""
    watch = Stopwatch()
    optimizer = step.args[1]
    with (
        watch.on("update", torch.nn.utils, "clip_grad_norm_"),
        watch.on("update", optimizer, "step"),
        watch.on("update", optimizer, "zero_grad"),
    ):
        step()
    return watch.seconds["update"]


def slow_steps(size: Size, threads: int, rounds: int) -> pd.DataFrame:
    """Seconds and peak memory of a slow step, over Baseline's, for each size of micro-batches up to Baseline's."""
    sizes = [dataclasses.replace(size, slow_batch_size=one) for one in range(1, size.baseline_batch_size + 1)]
    seconds = in_fresh_process(seconds_of_slow_steps, sizes, threads, rounds)
    baseline = in_fresh_process(peak, "baseline", size, threads)
    memory = [in_fresh_process(peak, "slow", one, threads) / baseline for one in sizes]
    index = pd.Index([one.slow_batch_size for one in sizes], name="samples of a slow micro-batch")
    return pd.DataFrame({"s over Baseline's": seconds, "peak memory over Baseline's": memory}, index=index)


def seconds_of_slow_steps(sizes: list[Size], threads: int, rounds: int) -> list[float]:
    """Median seconds of a slow step of each size, divided by a Baseline step's; all in turns."""
    torch.set_num_threads(threads)
    steps = [make_steps(sizes[0], ("baseline",))[1]["baseline"]]
    steps += [make_steps(size, ("slow",))[1]["slow"] for size in sizes]
    rows = [[timed(step) for step in steps] for _ in range(rounds + 1)][1:]
    baseline, *slow = map(statistics.median, zip(*rows, strict=True))
    return [seconds / baseline for seconds in slow]


if __name__ == "__main__":
    main()
