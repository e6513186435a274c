"""Reader of `metrics.jsonl`: one JSON line for each logged step, with "step", "time" in ms and "metrics".

A job that is killed, or that fills the disk, leaves its last line torn. The next job ends that line and writes the
step again, so the reader skips lines that are no JSON.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LoggedStep:
    """One line of the file."""

    step: int
    """Optimizer step."""
    time: int
    """Milliseconds since 1970."""
    metrics: dict[str, float]
    """Values by name; a step may have several lines, each with other names."""
    end: int
    """Byte offset behind the line."""


def read_metrics(path: Path, offset: int = 0) -> Iterator[LoggedStep]:
    """Yield the complete lines behind byte `offset`; none if the file doesn't exist."""
    if not path.exists():
        return
    end = offset
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return  # another process is writing it, or it is torn
            end += len(line)
            try:
                record = json.loads(line)
            except ValueError:
                continue
            yield LoggedStep(record["step"], record["time"], record["metrics"], end)
