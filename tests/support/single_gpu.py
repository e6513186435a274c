"""All that config/single-gpu downloads, at toy size, for a local server; the configuration with its addresses."""

import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from tests.support import official
from tests.support.archives import zipped
from tests.support.http_server import HTTPServer
from tests.support.parquet import picture_bytes
from tests.support.paths import REPOSITORY
from tests.support.tiny_chat import tiny_parts

CHATS = {"Qwen/Qwen2.5-VL-3B-Instruct": "qwen2_5_vl", "HuggingFaceTB/SmolVLM-256M-Instruct": "idefics3"}
"""Repository -> name in tests.support.tiny_chat of a model and processor of the classes that its config.json names."""
CAULDRON = "HuggingFaceM4/the_cauldron"
SUBSETS = ("vqav2", "aokvqa", "textvqa", "scienceqa")
NUM_ROWS, LIMIT = 6, 4
"""Rows of each subset, and the limit of textvqa."""
NUM_STEPS = 4
CLASSES = {
    "qwen2.5-vl-3b": "Qwen2_5_VLForConditionalGeneration",
    "smolvlm-256m": "Idefics3ForConditionalGeneration",
}
"""Key of `models` -> class of its checkpoint, as its config.json on the Hub names it."""
QUESTIONS = {"scienceqa": "llava_test_CQM-A.json", "textvqa": "llava_textvqa_val_v051_ocr.jsonl"}
QUESTIONS["pope"] = "llava_pope_test.jsonl"
"""Benchmark -> file of LLaVA's eval.zip."""
ARCHIVES = {
    "scienceqa/images/test": ("scienceqa.s3.us-west-1.amazonaws.com/images/test.zip", "test"),
    "textvqa/train_images": ("dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip", "train_images"),
    "pope/val2014": ("images.cocodataset.org/zips/val2014.zip", "val2014"),
}
"""Folder of a benchmark's images -> (address of their archive, folder inside)."""


def serve(root: Path, scratch: Path) -> None:
    """Write the files of the local server; `eval.zip`, which is had by hand alone, to `scratch`."""
    for repo, name in CHATS.items():
        serve_checkpoint(root / "hub/models" / repo, name)
    serve_cauldron(root / "hub/datasets" / CAULDRON)
    serve_benchmarks(root, scratch)


def serve_checkpoint(folder: Path, name: str) -> None:
    """Tiny checkpoint in bfloat16, as published ones are."""
    model, processor = tiny_parts(name)
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "merges.txt").write_text("#version: 0.2\n")


def serve_cauldron(folder: Path) -> None:
    """Subsets with the columns of the_cauldron: images as bytes, and pairs of user and assistant."""
    configs = []
    for index, name in enumerate(SUBSETS):
        rows = [
            {
                "images": [{"bytes": picture_bytes((30 + 4 * number, 40 + index)), "path": None}],
                "texts": [
                    {"user": f"What is number {number}?", "assistant": f"A {name}.", "source": name},
                    {"user": "Is it red?\nAnswer yes or no.", "assistant": "No", "source": name},
                ][: 1 + number % 2],
            }
            for number in range(NUM_ROWS)
        ]
        (folder / name).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / name / "train-00000-of-00001-0a1b2c3d4e5f6071.parquet")
        files = [{"split": "train", "path": f"{name}/train-*"}]
        configs.append({"config_name": name, "data_files": files})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")


def serve_benchmarks(root: Path, scratch: Path) -> None:
    """Official files at their addresses, images in their archives, LLaVA's question files in `scratch`/eval.zip."""
    by_hand: dict[str, bytes] = {}
    addresses = {
        f"{name}/{Path(file['path']).name}": urlsplit(file["url"])
        for file in config()["downloads"]["benchmarks"]["files"]
        if (name := Path(file.get("path", "")).parent.name)
    }
    for name, questions in QUESTIONS.items():
        limit = None if name == "textvqa" else 6
        folder = official.write_benchmark(name, scratch / name, limit=limit)
        by_hand[f"{name}/{questions}"] = (folder / questions).read_bytes()
        for file in folder.glob("*.json"):
            if address := addresses.get(f"{name}/{file.name}"):
                write(root / f"{address.netloc}{address.path}", file.read_bytes())
    for folder, (address, inside) in ARCHIVES.items():
        found = scratch / folder if (scratch / folder).is_dir() else scratch / Path(folder).parent / "images"
        files = [file for file in found.rglob("*") if file.is_file()]
        write(root / address, zipped({f"{inside}/{file.relative_to(found)}": file.read_bytes() for file in files}))
    write(scratch / "eval.zip", zipped(by_hand))


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def config() -> dict[str, Any]:
    """Content of config/single-gpu/config.yaml."""
    return yaml.safe_load((REPOSITORY / "config/single-gpu/config.yaml").read_text(encoding="utf-8"))


def config_in_small(server: HTTPServer) -> dict[str, Any]:
    """The configuration with the server's addresses, a CPU in place of the GPU, few steps, and one small limit."""
    content = config()
    for file in content["downloads"]["benchmarks"]["files"]:
        if file["url"].startswith("http"):
            address = urlsplit(file["url"])
            file["url"] = f"{server.url}/{address.netloc}{address.path}"
    content["inference"]["max_new_tokens"] = 4
    for model in content["models"].values():
        model["resources"] = {name: {"gpu": 0, "cpus": 1, "mem_mb": 2000} for name in ("finetune", "answer", "speed")}
        recipe = model["stages"]["finetune"]
        recipe["data"] = [dict(source) for source in recipe["data"]]
        recipe["data"][SUBSETS.index("textvqa")]["limit"] = LIMIT
        recipe |= {"global_batch_size": 4, "per_device_batch_size": 2}
        if "slow_per_device_batch_size" in recipe:
            recipe["slow_per_device_batch_size"] = 1
        recipe["training_arguments"] |= {"use_cpu": True, "max_steps": NUM_STEPS, "dataloader_num_workers": 0}
        recipe["training_arguments"] |= {"logging_steps": 1, "save_steps": 2, "learning_rate": 1e-2}
    return json.loads(json.dumps(content))  # no anchors, so that an edit changes one model
