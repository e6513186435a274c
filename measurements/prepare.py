"""Preparation of many samples: time, cores used and peak memory, from JSON and from parquet.

    python -m measurements.prepare [--rows 100000] [--kinds JSON parquet]

Writes a dataset of that many samples to a temporary folder: noisy JPEG images of 320 x 240 pixels, each in two samples
as in LLaVA's instruction data, and a tenth of the samples without an image; for parquet an image in each row. Then
runs `dualspeed prepare` on it as a process of its own, and prints the resources that the system counted for it.
"""

import argparse
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
)

from dualspeed.settings.jobs import write_settings
from dualspeed.settings.recipe import DataRecipe
from measurements.llama_tokenizer import train_llama_tokenizer

WORDS = "the a man dog red car street holds looks stands beside near many small bright old photograph of two".split()
SIZE = (320, 240)


def main() -> None:
    """Generate the data, prepare it from each kind of file, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--kinds", nargs="+", choices=["JSON", "parquet"], default=["JSON", "parquet"])
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args()
    print(f"{options.rows} rows, {options.workers} workers, {os.cpu_count()} CPUs", flush=True)
    print("| annotations | seconds | samples/s | CPU seconds | cores used | peak memory MB |")
    print("|:--|--:|--:|--:|--:|--:|", flush=True)
    with tempfile.TemporaryDirectory(prefix="prepare-") as name:
        folder = Path(name)
        write_model(folder / "model")
        pictures = make_pictures(16)
        for kind in options.kinds:
            recipe = {"JSON": write_json, "parquet": write_parquet}[kind](folder / kind, options.rows, pictures)
            seconds, cpu, peak = measure(recipe, folder, options.workers)
            print(
                f"| {kind} | {seconds:.1f} | {options.rows / seconds:.0f} | {cpu:.1f} | {cpu / seconds:.2f} "
                f"| {peak / 1e6:.0f} |",
                flush=True,
            )


def measure(recipe: DataRecipe, folder: Path, workers: int) -> tuple[float, float, int]:
    """Wall seconds, CPU seconds and peak bytes of `dualspeed prepare`."""
    settings = write_settings(recipe, folder / "settings")
    command = [sys.executable, "-m", "dualspeed.cli", "prepare", "--settings", str(settings)]
    command += ["--model", str(folder / "model"), "--out", str(folder / "out"), "--workers", str(workers)]
    started = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(errors[-3000:])
    return time.monotonic() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def make_pictures(number: int) -> list[bytes]:
    """Contents of JPEG files as noisy as photographs, which take as long to decode."""
    generator, pictures = np.random.default_rng(0), []
    for _ in range(number):
        coarse = generator.integers(0, 255, (60, 80, 3), dtype=np.uint8)
        picture = np.asarray(Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = np.clip(picture + generator.normal(0, 12, picture.shape), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy).save(buffer, format="JPEG", quality=85)
        pictures.append(buffer.getvalue())
    return pictures


def conversation(generator: random.Random, has_image: bool) -> list[dict[str, str]]:
    """Two to six pairs of question and answer."""
    turns = []
    for number in range(generator.randint(2, 6)):
        question = " ".join(generator.choices(WORDS, k=12)) + "?"
        turns.append({"from": "human", "value": "<image>\n" * (has_image and number == 0) + question})
        turns.append({"from": "gpt", "value": " ".join(generator.choices(WORDS, k=20)) + "."})
    return turns


def write_json(folder: Path, num_rows: int, pictures: list[bytes]) -> DataRecipe:
    """Write LLaVA's layout: a JSON list and a folder of images, each in two samples."""
    (folder / "images").mkdir(parents=True)
    generator, originals = random.Random(0), [folder / f"{index}.jpg" for index in range(len(pictures))]
    for path, picture in zip(originals, pictures, strict=True):
        path.write_bytes(picture)
    with open(folder / "data.json", "w", encoding="utf-8") as file:
        for row in tqdm(range(num_rows), desc="writing JSON", disable=None):
            has_image, name = row % 10 != 0, f"{row // 2 // 1000:03d}/{row // 2:06d}.jpg"
            path = folder / "images" / name
            if has_image and not path.exists():
                path.parent.mkdir(exist_ok=True)
                path.hardlink_to(originals[row // 2 % len(originals)])
            entry = {"id": str(row), "conversations": conversation(generator, has_image)}
            file.write(("[" if row == 0 else ",\n") + json.dumps(entry | ({"image": name} if has_image else {})))
        file.write("]")
    return DataRecipe(annotations=str(folder / "data.json"), images=str(folder / "images"))


def write_parquet(folder: Path, num_rows: int, pictures: list[bytes]) -> DataRecipe:
    """Write LLaVA-NeXT-Data's layout: parquet files with the images in their rows."""
    (folder / "data").mkdir(parents=True)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    turns = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
    schema = pa.schema([("id", pa.string()), ("image", image), ("conversations", turns)])
    generator, per_file = random.Random(0), 5000
    for number, start in enumerate(tqdm(range(0, num_rows, per_file), desc="writing parquet", disable=None)):
        with pq.ParquetWriter(folder / "data" / f"train-{number:05d}.parquet", schema) as writer:
            for row in range(start, min(start + per_file, num_rows), 100):
                rows = range(row, min(row + 100, num_rows))
                writer.write_table(
                    pa.Table.from_pylist(
                        [
                            {
                                "id": str(index),
                                "image": {"bytes": pictures[index % len(pictures)], "path": None},
                                "conversations": conversation(generator, has_image=True),
                            }
                            for index in rows
                        ],
                        schema=schema,
                    )
                )
    return DataRecipe(annotations=str(folder / "data"), images=str(folder / "images"))


def write_model(folder: Path) -> None:
    """Write the processor and configuration of a LLaVA-1.5 with a Llama-like tokenizer."""
    generator = random.Random(0)
    lines = [" ".join(generator.choices([*WORDS, "USER:", "ASSISTANT:"], k=30)) for _ in range(2000)]
    tokenizer = train_llama_tokenizer(lines, 700)
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    LlavaConfig(vision_config=CLIPVisionConfig(), text_config=LlamaConfig()).save_pretrained(folder)


if __name__ == "__main__":
    main()
