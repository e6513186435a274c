"""Every figure that needs a GPU, by one command that ends within eight minutes on one H100 or H200 with 16 cores.

    python -m measurements.gpu [--out measurements/gpu.json] [--minutes 8] [--toy]

It asks for no more than torch, transformers, safetensors and pillow, and for no network: models have random weights,
which are made on the device. What an older transformers lacks is said at the start. The JSON is written after each row,
with the machine in it; a cell holds a figure, or the reason why it has none. `python -m measurements.gpu_tables` makes
the tables of docs/speed.md from it. `--toy` runs all of it with tiny models, on a CPU in a minute or two.
"""

import argparse
import inspect
import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers

from dualspeed.device import best_device
from dualspeed.pruners import PRUNERS
from measurements import gpu_device as devices
from measurements import gpu_packing, gpu_parts, gpu_steps
from measurements.gpu_cells import Bench, Cells, Part, Reason, explain
from measurements.gpu_models import REAL
from measurements.older_transformers import FIRST_VERSION

SPARE_SECONDS = 15
"""Time kept back for the end of a row that the alarm interrupts."""
KINDS = ("LoRA", "full")
PARTS = (
    Part(
        name="steps",
        title="Training steps",
        note="Trained weights, gradients and AdamW's moments are float32 under bfloat16 autocast, frozen weights "
        "bfloat16. GiB: peak memory. MFU: FLOPs without recomputation over the data sheet's dense bfloat16 rate. "
        "Pruner: its share of a fast step. Speedup: of mixed steps (r = 0.1) over Baseline's; limit: the same in "
        "FLOPs. Where `layers` names two depths, the model didn't fit, and the figures are the line through both.",
        rows=tuple(f"{name}, {kind}" for name in REAL for kind in KINDS),
        columns=gpu_steps.COLUMNS,
        measure=gpu_steps.train_row,
        seconds=75,
    ),
    Part(
        name="syncs",
        title="Host syncs of a micro-batch, forward and backward",
        note="Ours: the innermost frame outside torch is in `dualspeed/`.",
        rows=tuple(REAL),
        columns=gpu_parts.SYNC_COLUMNS,
        measure=gpu_parts.sync_row,
        seconds=20,
    ),
    Part(
        name="answers",
        title="Answers",
        note=f"Questions a second, {gpu_parts.NEW_TOKENS} new tokens each, in bfloat16.",
        rows=tuple(REAL),
        columns=gpu_parts.ANSWER_COLUMNS,
        measure=gpu_parts.answer_row,
        seconds=40,
    ),
    Part(
        name="pruners",
        title="Pruners",
        note="On random float32 tokens (images x tokens x width), p = 0.9, beside the published algorithm, image by "
        "image.",
        rows=tuple(f"{name}, {shape}" for shape in gpu_parts.PRUNER_SHAPES for name in sorted(PRUNERS)),
        columns=("ms", "published ms", "MiB"),
        measure=gpu_parts.pruner_row,
        seconds=6,
    ),
    Part(
        name="selection",
        title="Kept tokens in bfloat16 beside float32",
        note="Shares of tokens that training under bfloat16 autocast keeps as float32 would, in LLaVA-1.5's shapes "
        "with random weights: given the same features, and with tower and projector in either precision.",
        rows=tuple(name for name in sorted(PRUNERS) if name not in ("random", "uniform", "spatial_pool")),
        columns=("same features", "end to end"),
        measure=gpu_parts.selection_row,
        seconds=15,
    ),
    Part(
        name="input",
        title="Input",
        note="640 x 480 JPEG images a second: LLaVA's through the collator, Qwen's through the image processor alone. "
        "Needed: by fast steps of LoRA on this device.",
        rows=tuple(REAL),
        columns=gpu_parts.INPUT_COLUMNS,
        measure=gpu_parts.input_row,
        seconds=40,
    ),
    Part(
        name="packing",
        title="Packed rows",
        note="Seconds of a step by LoRA with rows that are padded (SDPA), and behind one another without padding (flex "
        "attention, and flash attention 2 where it is installed). Padding: its share of the padded batch.",
        rows=tuple(REAL),
        columns=gpu_packing.COLUMNS,
        measure=gpu_packing.packing_row,
        seconds=60,
    ),
)


def main(arguments: list[str] | None = None) -> None:
    """Measure every part, and write the JSON after each row."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("measurements/gpu.json"))
    parser.add_argument("--minutes", type=float, default=8, help="later rows are left out, with a reason")
    parser.add_argument("--toy", action="store_true", help="tiny models, to try the command itself")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * options.minutes - SPARE_SECONDS
    bench = Bench(device=best_device(), is_toy=options.toy)
    machine = devices.describe(bench.device)
    print("; ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    for line in shortcomings():
        print(line, flush=True)
    result = {"machine": machine, "is_toy": options.toy, "shortcomings": shortcomings(), "seconds": 0.0, "parts": {}}
    start = time.monotonic()
    for part, row in order():
        cells = measured(bench, part, row, deadline)
        result["parts"].setdefault(part.name, {})[row] = {name: as_json(cells[name]) for name in part.columns}
        result["seconds"] = round(time.monotonic() - start, 1)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{result['seconds']:6.1f} s  {part.name}: {row}: {summary(cells)}", flush=True)


def order() -> Iterator[tuple[Part, str]]:
    """Parts and rows in the order of their measurement: what shares a model together."""
    parts = {part.name: part for part in PARTS}
    for name in REAL:
        yield parts["steps"], f"{name}, LoRA"
        yield parts["syncs"], name
        yield parts["answers"], name
    for name in REAL:
        yield parts["steps"], f"{name}, full"
    for name in ("selection", "pruners", "input", "packing"):
        yield from ((parts[name], row) for row in parts[name].rows)


def shortcomings() -> list[str]:
    """Sentences on what this machine's software lacks, with the version that has it."""
    found = []
    if "mm_encoder_outputs" not in inspect.signature(transformers.LlavaForConditionalGeneration.forward).parameters:
        found.append(
            f"transformers {transformers.__version__} has no mm_encoder_outputs ({FIRST_VERSION} has it): training "
            "steps run by a replaced forward (measurements/older_transformers.py), and there are no pruned answers."
        )
    for name in REAL.values():
        if not hasattr(transformers, name.config):
            found.append(f"transformers {transformers.__version__} has no {name.config}: its rows hold this reason.")
    return found


def measured(bench: Bench, part: Part, row: str, deadline: float) -> Cells:
    """Cells of a row: every column has a figure, a word, or a reason."""
    left = deadline - time.monotonic()
    cells: Cells = {}
    if left <= 0:
        missing = Reason("the time of the whole measurement was over")
    else:
        limit = min(part.seconds * (10 if bench.is_toy else 1), left)  # toy sizes run on busy machines too
        missing = Reason("not measured by this part")
        try:
            with time_limit(limit):
                part.measure(bench, row, cells)
        except OutOfTimeError:
            missing = Reason(f"took longer than {limit:.0f} s")
            bench.drop_models()
        except Exception as error:  # the measurement goes on with the next row, whatever went wrong in this one
            missing = Reason(explain(error))
            error.__traceback__ = None
            bench.drop_models()
    return {column: cells.get(column, missing) for column in part.columns}


class OutOfTimeError(BaseException):
    """A row has taken its time; no Exception, so that nothing in between catches it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTimeError in the block inside once these seconds are over."""

    def stop(*_: object) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def as_json(cell: float | str | Reason) -> float | str | dict[str, str]:
    """Cell as the JSON holds it."""
    return {"reason": cell.text} if isinstance(cell, Reason) else cell


def summary(cells: Cells) -> str:
    """Cells of a row in one line."""
    shown = {
        name: f"({cell.text})" if isinstance(cell, Reason) else cell if isinstance(cell, str) else f"{cell:.3g}"
        for name, cell in cells.items()
    }
    return ", ".join(f"{name} {text}" for name, text in shown.items())


if __name__ == "__main__":
    main()
