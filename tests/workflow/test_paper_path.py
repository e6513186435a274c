"""The paper's configuration from download to scores: real rules and recipes, tiny models and files, a local server."""

import copy
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import CLIPModel

from tests.support import official, parts
from tests.support.archives import zipped
from tests.support.http_server import HTTPServer
from tests.support.parquet import picture_bytes, write_parquet
from tests.support.parts import hub_shapes
from tests.support.samples import entry
from tests.support.workflow import REPOSITORY

ROWS = {
    "llava-1.5-7b": "llava-1.5-7b-dualspeed-divprune-p0.9",
    "llava-next-7b": "llava-next-7b-dualspeed-divprune-p0.9",
}
# Image roots of mix665k: folder in its image paths -> (archive, or repository of the Hub; folder inside)
ROOTS = {
    "coco/train2017": "images.cocodataset.org/zips/train2017.zip",
    "gqa/images": "downloads.cs.stanford.edu/nlp/data/gqa/images.zip",
    "textvqa/train_images": "dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip",
    "vg/VG_100K": "cs.stanford.edu/people/rak248/VG_100K_2/images.zip",
    "vg/VG_100K_2": "cs.stanford.edu/people/rak248/VG_100K_2/images2.zip",
}


def write_bytes(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def serve_models(hub: Path) -> None:
    """Vicuna and CLIP as their repositories have them: weights as .bin."""
    parts.make_vicuna(hub / "models/lmsys/vicuna-7b-v1.5")
    clip = parts.make_clip(hub / "models/openai/clip-vit-large-patch14-336")
    torch.save(CLIPModel.from_pretrained(clip).state_dict(), clip / "pytorch_model.bin")
    (clip / "model.safetensors").unlink()


def serve_data(root: Path) -> None:
    """Training data in the layouts of LLaVA's and LLaVA-NeXT's repositories and of the image archives."""
    datasets = root / "hub/datasets"
    captions = [entry("<image>\nDescribe it.", "a red digit", image=f"00000/{i}.jpg", name=str(i)) for i in range(8)]
    pictures = {f"00000/{i}.jpg": picture_bytes((40 + i, 30)) for i in range(8)}
    pretrain = datasets / "liuhaotian/LLaVA-Pretrain"
    write_bytes(pretrain / "blip_laion_cc_sbu_558k.json", json.dumps(captions).encode())
    write_bytes(pretrain / "images.zip", zipped(pictures))

    rows = [entry("Is it red?", "no", "Why?", "It is blue.", name=f"text{i}") for i in range(4)]
    for folder, archive in ROOTS.items():
        name = folder.rpartition("/")[2]
        write_bytes(root / archive, zipped({f"{name}/{i}.jpg": picture_bytes((30, 40 + i)) for i in range(4)}))
        rows += [entry("<image>\nWhat is it?", "a digit", image=f"{folder}/{i}.jpg", name=folder) for i in range(4)]
    for index in range(3):
        image = f"ocr_vqa/images/{index}.jpg"
        rows.append(entry("<image>\nWho wrote it?", "A", image=image, name=f"book{index}"))
        if index:  # the first is missing, as some of OCR-VQA's always are
            write_bytes(datasets / "ej2/llava-ocr-vqa/images" / f"{index}.jpg", picture_bytes((50, 60)))
    random.Random(0).shuffle(rows)
    write_bytes(datasets / "liuhaotian/LLaVA-Instruct-150K/llava_v1_5_mix665k.json", json.dumps(rows).encode())

    (next_data := datasets / "lmms-lab/LLaVA-NeXT-Data").mkdir(parents=True)
    rows = [
        entry("<image>\nWhich one?", "B", name=str(i), image={"bytes": picture_bytes((60 + i, 40)), "path": None})
        for i in range(10)
    ]
    write_parquet(next_data / "data", [*rows, entry("Is it red?", "no", name="text", image=None)])


def serve_benchmark(root: Path, scratch: Path) -> None:
    """LLaVA's eval.zip, with POPE alone."""
    folder = official.write_benchmark("pope", scratch / "pope", limit=6)
    files = {f"pope/{file.relative_to(folder)}": file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    write_bytes(root / "eval.zip", zipped(files))


def paper_in_small(server: HTTPServer) -> dict:
    """config/paper/config.yaml with the server's addresses, a CPU in place of eight GPUs, and few steps."""
    config = yaml.safe_load((REPOSITORY / "config/paper/config.yaml").read_text())
    config["tracking"]["uri"] = "sqlite:///results/mlflow.db"
    del config["downloads"]["vicuna-13b"]
    for source in config["downloads"].values():
        for file in source.get("files", []):
            if file.get("url", "").startswith("http"):
                address = urlsplit(file["url"])
                file["url"] = f"{server.url}/{address.netloc}{address.path}"
    config["downloads"]["eval"]["files"] = [{"url": f"{server.url}/eval.zip", "unpack": "."}]
    config["benchmarks"] = {"pope": {"folder": "data/eval/pope"}}
    config["inference"] |= {"max_new_tokens": 4}
    config["models"] = {name: copy.deepcopy(config["models"][name]) for name in ROWS}
    job = {"gpu": 0, "cpus": 1, "mem_mb": 2000}
    for model in config["models"].values():
        model["resources"] = {name: job for name in ("pretrain", "finetune", "answer", "speed")}
        if model["parts"].get("image_grid_pinpoints"):
            model["parts"]["image_grid_pinpoints"] = [[2 * parts.IMAGE_SIZE, 2 * parts.IMAGE_SIZE]]
        for recipe in model["stages"].values():
            recipe |= {"global_batch_size": 4, "per_device_batch_size": 2, "accelerate_config": None}
            del recipe["training_arguments"]["tf32"]
            recipe["training_arguments"] |= {"use_cpu": True, "max_steps": 3, "dataloader_num_workers": 0}
            recipe["training_arguments"] |= {"logging_steps": 1, "save_steps": 2}
    return config


@pytest.mark.slow
def test_the_papers_configuration_goes_from_download_to_scores(tmp_path):
    project, served = tmp_path / "project", tmp_path / "served"
    for name in ("workflow", "profiles", "config"):
        shutil.copytree(REPOSITORY / name, project / name)
    shutil.copy(REPOSITORY / "Snakefile", project)
    serve_models(served / "hub")
    serve_data(served)
    serve_benchmark(served, tmp_path)
    with HTTPServer(served) as server:
        (project / "config/paper/config.yaml").write_text(yaml.safe_dump(paper_in_small(server), sort_keys=False))
        keep = {"id", *ROWS.values()}
        sheet = (project / "config/paper/experiments.tsv").read_text().splitlines(keepends=True)
        (project / "config/paper/experiments.tsv").write_text(
            "".join(line for line in sheet if line.split("\t")[0] in keep)
        )
        for archive in ROOTS.values():
            server.fail(f"/{archive}", "break", 500)
        targets = [f"results/scores/{row}/full/pope.json" for row in ROWS.values()]
        command = [sys.executable, "-m", "snakemake", "--configfile", "config/paper/config.yaml", "--cores", "2"]
        environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run(
            [*command, *targets], cwd=project, env=environment, capture_output=True, text=True, timeout=1500
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]

    lock = json.loads((project / "config/paper/data.lock").read_text())
    assert set(lock) == set(paper_in_small(server)["downloads"]) - {"qwen3-vl-4b"}  # no row's, and not on the server
    manifest = json.loads((project / "results/prepared/llava-1.5-7b/finetune/manifest.json").read_text())
    assert (manifest["num_samples"], manifest["dropped_by_reason"]) == (4 + 4 * len(ROOTS) + 2, {"image: missing": 1})
    manifest = json.loads((project / "results/prepared/llava-next-7b/finetune/manifest.json").read_text())
    assert manifest["num_samples"] == 11
    for model, row in ROWS.items():
        score = json.loads((project / f"results/scores/{row}/full/pope.json").read_text())
        assert score["num_questions"] > 0 and 0 <= score["score"] <= 100
        family = "llava_next" if "next" in model else "llava"
        with safe_open(project / f"results/models/{row}/model.safetensors", framework="pt") as file:
            names = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        sizes = (parts.TEXT_WIDTH, 96, parts.TEXT_LAYERS, 384, (parts.VISION_WIDTH, 64, parts.VISION_LAYERS, 17, 7))
        assert names == hub_shapes(family, *sizes)
    processor = json.loads((project / f"results/models/{ROWS['llava-1.5-7b']}/processor_config.json").read_text())
    assert processor["image_processor"]["do_pad"] is True
