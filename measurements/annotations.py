"""Reading of a large list of annotations: ours beside ijson, by time and peak memory.

    pip install ijson
    python -m measurements.annotations [--rows 250000] [--rounds 3]

Writes a JSON list of that many LLaVA-like samples, then reads it entry by entry, each time in a process of its own and
with the readers in turns. Seconds are those of the loop over the entries, by the clock and of the CPU, which other work
on the machine slows less; memory is the peak of the whole process.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dualspeed.data.annotations import read_entries


def main() -> None:
    """Write the file, read it in turns, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=250_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in READERS}
    with tempfile.TemporaryDirectory(prefix="annotations-") as folder:
        file = Path(folder) / "data.json"
        write_list(file, options.rows)
        print(f"{options.rows} entries, {file.stat().st_size / 1e6:.0f} MB, {options.rounds} rounds\n")
        for _ in range(options.rounds):
            for name in READERS:
                found[name].append(measure(name, file, options.rows))
    print("| reader | seconds, each round | CPU seconds, each round | CPU seconds, median | peak memory MB |")
    print("|:--|:--|:--|--:|--:|")
    for name, rounds in found.items():
        wall, cpu, peak = zip(*rounds, strict=True)
        each = " | ".join(", ".join(f"{value:.2f}" for value in values) for values in (wall, cpu))
        print(f"| {name} | {each} | {statistics.median(cpu):.2f} | {max(peak):.0f} |")


def write_list(file: Path, num_rows: int) -> None:
    """Write a JSON list in the layout of LLaVA's instruction data."""
    from measurements.prepare import conversation  # imports transformers, which would add to the readers' memory

    generator = random.Random(0)
    with open(file, "w", encoding="utf-8") as out:
        for row in range(num_rows):
            entry = {"id": str(row), "image": f"{row // 1000:03d}/{row:06d}.jpg"}
            entry["conversations"] = conversation(generator, has_image=True)
            out.write(("[" if row == 0 else ",\n") + json.dumps(entry))
        out.write("]")


def measure(name: str, file: Path, num_rows: int) -> tuple[float, float, float]:
    """Seconds, CPU seconds and peak MB of one reader in a process of its own."""
    command = [sys.executable, "-c", f"from measurements.annotations import read; read({name!r}, {str(file)!r})"]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    seconds, cpu, peak, num_read, num_turns = output.split()
    if int(num_read) != num_rows or int(num_turns) < 2 * num_rows:
        raise SystemExit(f"{name}: {num_read} of {num_rows} entries, {num_turns} turns")
    return float(seconds), float(cpu), float(peak)


def read(name: str, file: str) -> None:
    """Read the file to its end; print seconds, CPU seconds, peak MB, entries and turns."""
    num_read = num_turns = 0
    started, cpu_started = time.perf_counter(), time.process_time()
    for value in READERS[name](Path(file)):
        num_read += 1
        num_turns += len(value["conversations"])
    print(time.perf_counter() - started, time.process_time() - cpu_started, peak_memory(), num_read, num_turns)


def peak_memory() -> float:
    """Peak resident MB of this process; `getrusage` also counts the process that started it."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024 / 1e6


def by_us(file: Path) -> Iterator[Any]:
    """Yield the values of the list with `read_entries`."""
    return (entry.value for entry in read_entries(file))


def by_ijson(file: Path) -> Iterator[Any]:
    """Yield the values of the list with ijson's fastest backend, which is in C."""
    import ijson

    with open(file, "rb") as content:
        yield from ijson.get_backend("yajl2_c").items(content, "item", use_float=True, buf_size=1 << 20)


READERS: dict[str, Callable[[Path], Iterator[Any]]] = {"ours": by_us, "ijson (yajl2_c)": by_ijson}

if __name__ == "__main__":
    main()
