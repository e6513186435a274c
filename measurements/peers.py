"""Training steps of our trainer beside those of others: one model, the same samples, one table.

    python -m measurements.peers [--results results] [--rounds 3] [--steps 40] [--processes 1 2] [--out peers.json]

Needs the base model and the prepared data of `make demo` (`--results`: its results folder), and trl. In each round
every trainer runs once, in new processes, so that other load on the machine affects all of them alike, and the peak of
memory is its own. All train the same samples in the same order, data loading included, BATCH_SIZE samples a step on all
processes together (two: DDP over gloo), by the stock trainer's AdamW, in float32, with the tower frozen. None
recomputes activations, which TRL would by default, and which the published recipe does. All use ConversationCollator
but TRL's, which has its own. The table shows medians over the steps behind the warm-up, of all rounds; of mixed steps
(1 - r) fast + r slow, by the medians of both. `tokens/s` counts the samples' tokens, those that fast steps prune
included. Behind the table: why a trainer is not in it. Exit status 1 if the first losses of trainers that should do the
same work differ.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from dualspeed.layout import Layout

BATCH_SIZE, WARM_UP = 16, 5
SLOW_MODE_RATIO, PRUNING_RATIO = 0.1, 0.9
TRL = "TRL's SFTTrainer"
LARGEST_DIFFERENCE = 1e-3
"""Relative difference of the first losses of trainers that do the same work; later ones differ by rounding."""


@dataclass(frozen=True)
class Peer:
    """A way to train, in plain data: this module imports no torch."""

    trainer: str
    """One of peer_run.MAKERS."""
    method: Mapping[str, Any] = field(default_factory=dict)
    """Settings of DualSpeedConfig; empty: none, and all tokens."""
    option: str | None = None
    """Argument of DualSpeedTrainer that is added."""

    @property
    def reads_all_tokens(self) -> bool:
        """True for trainers without fast steps."""
        return self.method.get("slow_mode_ratio", 1.0) == 1.0


BASELINE = {"slow_mode_ratio": 1.0, "num_virtual_tokens": 0, "distillation_weight": 0.0}
FAST = {"slow_mode_ratio": 0.0, "pruning_ratio": PRUNING_RATIO}
MIXED = {"slow_mode_ratio": SLOW_MODE_RATIO, "pruning_ratio": PRUNING_RATIO, "mode_schedule": "stratified"}
PEERS = {
    "stock Trainer": Peer("Trainer"),
    TRL: Peer("SFTTrainer"),
    "plain steps, our own words, mixed": Peer("plain", MIXED),
    "ours, Baseline": Peer("DualSpeedTrainer", BASELINE),
    "ours, fast": Peer("DualSpeedTrainer", FAST),
    "ours, mixed": Peer("DualSpeedTrainer", MIXED),
    "ours, mixed, tokens_per_batch": Peer("DualSpeedTrainer", MIXED, "tokens_per_batch"),
    "ours, mixed, packing": Peer("DualSpeedTrainer", MIXED, "packing"),
    "ours, mixed, cache_features": Peer("DualSpeedTrainer", MIXED, "cache_features"),
}
Key = tuple[str, int]
"""A trainer's name and its number of processes."""


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=Path("results"), help="results folder of `make demo`")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help=f"timed steps of a round, behind {WARM_UP} of warm-up")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=int, help="CPU threads of a process; default: its share of the cores")
    parser.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS), metavar="TRAINER")
    parser.add_argument("--out", type=Path, help="write everything measured here, as JSON")
    options = parser.parse_args()
    if options.steps < 1 / SLOW_MODE_RATIO:
        parser.error(f"--steps: {options.steps} may have no slow step; valid: {1 / SLOW_MODE_RATIO:.0f} or more")
    keys = [(name, count) for count in options.processes for name in options.only]
    runs: dict[Key, list[dict]] = {key: [] for key in keys}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for name, count in keys:
                print(f"round {number + 1}: {name}, {count} processes", file=sys.stderr, flush=True)
                given = settings_of(options.results, name, options.steps, Path(folder))
                threads = options.threads or max(1, (os.cpu_count() or 1) // count)
                runs[name, count].append(run_apart(given, count, threads, Path(folder) / "run"))
    print(report(runs, options.steps))
    if options.out:
        options.out.write_text(
            json.dumps([{"trainer": key[0], "processes": key[1], "runs": runs[key]} for key in keys])
        )
    return int(bool(unequal_losses(runs)))


def settings_of(results: Path, name: str, steps: int, folder: Path) -> dict[str, Any]:
    """Settings of peer_run.py for the demo's model and data; `folder` holds what trainers write."""
    layout = Layout(str(results.resolve()))
    return {
        "peer": name,
        "base": layout.base_model("tiny"),
        "data": layout.prepared("tiny", "finetune"),
        "images": str(results.resolve().parent),
        "steps": steps,
        "cache": str(folder / "cache"),
    }


def run_apart(settings: dict[str, Any], num_processes: int, threads: int, folder: Path) -> dict[str, Any]:
    """Train in processes of its own; returns the figures of the first one, with the largest peak of memory of all.

    Raises:
        RuntimeError: a process failed.
    """
    folder.mkdir(exist_ok=True)
    for file in folder.glob("rank*.json"):
        file.unlink()
    (folder / "settings.json").write_text(json.dumps(settings))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    command = [sys.executable, *(launcher if num_processes > 1 else []), "-m", "measurements.peer_run", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    files = [folder / f"rank{rank}.json" for rank in range(num_processes)]
    if ended.returncode or not all(file.exists() for file in files):
        raise RuntimeError(f"{settings['peer']}, {num_processes} processes:\n{ended.stdout[-4000:]}")
    ranks = [json.loads(file.read_text()) for file in files]
    if "refused" not in ranks[0] and ranks[0]["processes"] != num_processes:
        raise RuntimeError(f"{settings['peer']}: trained in {ranks[0]['processes']} processes, not {num_processes}")
    return ranks[0] | {"peak_memory_bytes": max(rank.get("peak_memory_bytes", 0) for rank in ranks)}


def report(runs: Mapping[Key, list[dict]], steps: int) -> str:
    """Machine, table, and reasons of the trainers that are not in it."""
    machine = next((made["machine"] for of_key in runs.values() for made in of_key if "machine" in made), "nothing ran")
    refused = {key[0]: of_key[0]["refused"] for key, of_key in runs.items() if "refused" in of_key[0]}
    lines = [f"{machine}, batch {BATCH_SIZE}, {steps} steps a round", "", table(runs)]
    if refused:
        lines += ["", *(f"{name}: not there. {reason}" for name, reason in refused.items())]
    lines += [f"\nfirst losses differ, so that the work was not the same: {group}" for group in unequal_losses(runs)]
    return "\n".join(lines)


def table(runs: Mapping[Key, list[dict]]) -> str:
    """Table with one row for each trainer and number of processes."""
    seconds = {key: seconds_of(PEERS[key[0]], of_key) for key, of_key in runs.items() if "refused" not in of_key[0]}
    rows = []
    for (name, count), value in seconds.items():
        of_key, of_trl = runs[name, count], seconds.get((TRL, count))
        rounds = [seconds_of(PEERS[name], [made]) for made in of_key]
        peak = statistics.median(made["peak_memory_bytes"] for made in of_key)
        rows.append(
            {
                "trainer": name,
                "processes": count,
                "threads of each": of_key[0]["threads"],
                "s a step": f"{value:.4f}",
                "of each round": ", ".join(f"{one:.3f}" for one in rounds),
                "times as fast as TRL": f"{of_trl / value:.2f}" if of_trl else "",
                "samples/s": f"{BATCH_SIZE / value:.0f}",
                "tokens/s": f"{BATCH_SIZE * of_key[0]['tokens_of_a_sample'] / value:.0f}",
                "peak MiB of a process": f"{peak / 2**20:.0f}",
            }
        )
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)


def seconds_of(peer: Peer, runs: list[dict]) -> float:
    """Seconds of a step: the median of all, or of mixed steps that of each mode, by its share."""

    def median(mode: str) -> float:
        return statistics.median(value for made in runs for value in made["seconds"].get(mode, []))

    if peer.reads_all_tokens:
        return median("all")
    share = peer.method["slow_mode_ratio"]
    return (1 - share) * median("fast") + (share * median("slow") if share else 0.0)


def losses(runs: Mapping[Key, list[dict]]) -> list[dict[str, float]]:
    """First losses of the trainers that do the same work, in groups, by name and number of processes.

    Plain steps average over the tokens of each process, so that only one process has the same loss as ours.
    """
    groups: dict[str, dict[str, float]] = {}
    for (name, count), of_key in runs.items():
        peer = PEERS[name]
        if "refused" not in of_key[0] and not (peer.trainer == "plain" and count > 1):
            group = "all tokens" if peer.reads_all_tokens else json.dumps(peer.method)
            groups.setdefault(group, {})[f"{name}, {count}"] = of_key[0]["loss"]
    return list(groups.values())


def unequal_losses(runs: Mapping[Key, list[dict]]) -> list[dict[str, float]]:
    """Groups whose trainers had different first losses."""
    return [
        group
        for group in losses(runs)
        if max(group.values()) - min(group.values()) > LARGEST_DIFFERENCE * max(group.values())
    ]


if __name__ == "__main__":
    sys.exit(main())
