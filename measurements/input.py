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

import numpy as np
import pandas as pd
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    ProcessorMixin,
)

from dualspeed.chat_templates import load_template
from dualspeed.data.collator import ConversationCollator
from dualspeed.training.step_times import machine
from tests.support.word_tokenizer import word_tokenizer

SIDE, PATCH, BATCH = 336, 14, 16
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
    collate = ConversationCollator(processor_of(name))
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


def example(folder: Path, number: int) -> dict:
    """Row of a prepared dataset; writes its picture."""
    noise = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    path = folder / f"{number}.jpg"
    Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC).save(path, quality=90)
    question = [{"type": "image", "text": None}, {"type": "text", "text": "what is in the picture ? " * 8}]
    answer = [{"type": "text", "text": "there is a picture of many colours . " * 8}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": str(number), "messages": messages, "images": [str(path)]}


def processor_of(name: str) -> ProcessorMixin:
    """Processor of the model, with a tokenizer of a few words."""
    words = "<unk> <s> </s> <pad> <image> what is in the picture ? there a of many colours .".split()
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    if name == "llava-next-7b":
        kind, pictures = LlavaNextProcessor, LlavaNextImageProcessorPil(image_grid_pinpoints=[[672, 672]], **size)
    else:
        kind, pictures = LlavaProcessor, CLIPImageProcessorPil(**size)
    return kind(
        image_processor=pictures,
        tokenizer=word_tokenizer(words),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=load_template("vicuna_v1"),
    )


if __name__ == "__main__":
    main()
