"""Images a second that a core prepares for training, and that the fast steps of a GPU would need.

    python -m measurements.input [--images 64]

The images are JPEG files of random smooth pictures, 640 x 480, the most frequent size of LLaVA's photographs. They are
prepared as in training: by ConversationCollator with LLaVA-1.5's and LLaVA-NeXT's image processors, on one thread. The
need of a GPU is computed, not measured: its peak rate times an assumed utilisation, over the FLOPs of a fast step (6 a
parameter of the language model and token, 2 a parameter of the tower and patch).
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch

from dualspeed.data.collator import ConversationCollator
from dualspeed.device import machine
from measurements.training_pictures import example, processor_of

BATCH = 16
PEAK_FLOPS, UTILISATION = 989e12, 0.4
"""Dense bfloat16 FLOPs a second of an H100 or H200 (NVIDIA's data sheet), and the share that good training reaches."""
LLM_PARAMETERS, TOWER_PARAMETERS = 6.7e9, 0.3e9
TEXT_TOKENS, ISOLATOR_TOKENS = 130, 4
# name -> (tokens of the tower, visual tokens of a fast step at p = 0.9)
MODELS = {"llava-1.5-7b": (577, 57 + ISOLATOR_TOKENS), "llava-next-7b": (5 * 577, 5 * (57 + ISOLATOR_TOKENS))}


def main() -> None:
    """Print one line a model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=64, help="a multiple of 16 times 2 or more")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        examples = [example(Path(folder), number) for number in range(options.images)]
        rows = {name: row(name, examples) for name in MODELS}
    print(f"{machine()}, one thread, 640 x 480 JPEG, batches of {BATCH}")
    print(pd.DataFrame(rows).T.to_markdown())


def row(name: str, examples: list[dict]) -> dict[str, str]:
    """Cells of a model's line of the table."""
    collate = ConversationCollator(processor_of(name == "llava-next-7b"))
    batches = [examples[start : start + BATCH] for start in range(0, len(examples), BATCH)]
    seconds = [processor_seconds(collate, batch) for batch in batches]
    per_core = BATCH / statistics.median(seconds[1:])
    tower_tokens, kept = MODELS[name]
    flops = 6 * LLM_PARAMETERS * (kept + TEXT_TOKENS) + 2 * TOWER_PARAMETERS * tower_tokens
    wanted = PEAK_FLOPS * UTILISATION / flops
    return {
        "images/s a core": f"{per_core:.0f}",
        "images/s of an H200's fast steps (computed)": f"{wanted:.0f}",
        "cores for it": f"{wanted / per_core:.1f}",
    }


def processor_seconds(collate: ConversationCollator, batch: list[dict]) -> float:
    """CPU time of one batch in seconds, which depends little on other load on the machine."""
    start = time.process_time()
    collate(batch)
    return time.process_time() - start


if __name__ == "__main__":
    main()
