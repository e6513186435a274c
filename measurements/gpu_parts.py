"""Parts of measurements/gpu.py beside the training steps: pruners, selection, host syncs, answers, input."""

import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import Qwen2VLImageProcessorPil

from dualspeed.data.collator import ConversationCollator
from dualspeed.method.fast_mode import PrunerResult, observe_pruning
from dualspeed.method.model import DualSpeedModel
from dualspeed.pruners import PRUNERS, MergedTokens, VisualTokens
from dualspeed.settings.budget import num_tokens_to_keep
from dualspeed.settings.method import DualSpeedConfig
from dualspeed.settings.modes import Mode
from measurements import gpu_device as devices
from measurements import published
from measurements.gpu_cells import Bench, Cells, Reason, memory_cell, reasons
from measurements.gpu_models import IMAGE_TOKEN, PAD_TOKEN, PRUNING_RATIO, Shape, batch_of, build
from measurements.gpu_models import LowRank as Adapted
from measurements.gpu_steps import MODES
from measurements.older_transformers import FIRST_VERSION, let_take_features, restore, takes_features
from measurements.random_tokens import random_tokens
from measurements.training_pictures import example, processor_of

PRUNER_SHAPES = {"16x576x4096": (16, 576, 4096), "4x2880x4096": (4, 2880, 4096)}
TOY_SHAPES = {"16x576x4096": (2, 16, 32), "4x2880x4096": (2, 24, 32)}
NEW_TOKENS = 16
NOT_TRAINED = Reason("its training steps did not run")


def pruner_row(bench: Bench, row: str, cells: Cells) -> None:
    """Time and memory of a pruner, beside the published algorithm, which goes image by image."""
    name, text = row.split(", ")
    shape = (TOY_SHAPES if bench.is_toy else PRUNER_SHAPES)[text]
    tokens = random_tokens(*shape, bench.device)
    num_keep = num_tokens_to_keep(shape[1], PRUNING_RATIO)
    budgets = torch.full((shape[0],), num_keep)

    @torch.no_grad()
    def ours() -> None:
        PRUNERS[name](tokens, budgets)

    @torch.no_grad()
    def loop() -> None:
        algorithm = getattr(published, name)
        for image in zip(*(tokens.require(field) for field in published.fields_of(algorithm)), strict=True):
            algorithm(*image, num_keep)

    with reasons(cells, ["ms", "MiB"]):
        memory = memory_cell(bench, ours, with_present=False)
        cells["MiB"] = memory * 1024 if isinstance(memory, float) else memory
        cells["ms"] = 1e3 * statistics.median(devices.timed(ours, bench.device) for _ in range(bench.repeats))
    with reasons(cells, ["published ms"]):
        cells["published ms"] = 1e3 * devices.timed(loop, bench.device)


def selection_row(bench: Bench, row: str, cells: Cells) -> None:
    """Shares of tokens that bfloat16 training keeps as float32 would: given the same features, and end to end."""
    shape = bench.shapes["LLaVA-1.5-7B"]
    model, wide = (selecting_model(shape, row, bench.device, dtype) for dtype in (torch.bfloat16, torch.float32))
    with torch.no_grad():
        for narrow_values, values in zip(model.parameters(), wide.parameters(), strict=True):
            values.copy_(narrow_values)
    batch = batch_of(shape, bench.device)
    kept: list[Tensor] = []
    reference: list[Tensor] = []

    def observe(prune, tokens: VisualTokens) -> PrunerResult:
        result = prune()
        kept.append(indices_of(result))
        if not reference:
            budgets = [num_tokens_to_keep(count, PRUNING_RATIO) for count in tokens.valid().sum(dim=1).tolist()]
            with devices.plain(bench.device):
                reference.append(indices_of(model.pruner(in_float32(tokens), torch.tensor(budgets))))
        return result

    with torch.no_grad(), observe_pruning(model, observe), observe_pruning(wide, observe):
        with devices.bfloat16(bench.device):
            model(**batch, mode=Mode.FAST)
        wide(**batch | {"pixel_values": batch["pixel_values"].float()}, mode=Mode.FAST)
    cells |= {"same features": share_alike(kept[0], reference[0]), "end to end": share_alike(kept[0], kept[1])}


def selecting_model(shape: Shape, pruner: str, device: torch.device, dtype: torch.dtype) -> DualSpeedModel:
    """Model whose language model has one layer, since selection reads none of it."""
    vlm = build(shape, 1, device, dtype)
    if not takes_features(vlm):
        let_take_features(vlm)
    return DualSpeedModel(vlm, DualSpeedConfig(pruner=pruner, pruning_ratio=PRUNING_RATIO)).eval()


def indices_of(result: PrunerResult) -> Tensor:
    """Kept positions, on the CPU."""
    return (result.indices if isinstance(result, MergedTokens) else result).cpu()


def in_float32(tokens: VisualTokens) -> VisualTokens:
    """Copy whose floating-point fields are float32."""
    fields = {name: getattr(tokens, name) for name in VisualTokens.__dataclass_fields__}
    is_float = {name: value is not None and value.is_floating_point() for name, value in fields.items()}
    return replace(tokens, **{name: value.float() for name, value in fields.items() if is_float[name]})


def share_alike(first: Tensor, second: Tensor) -> float:
    """Share of the positions in `first`, image by image, that are in `second` too."""
    pairs = [(set(a) - {-1}, set(b) - {-1}) for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    return sum(len(a & b) for a, b in pairs) / sum(len(a) for a, _ in pairs)


def sync_row(bench: Bench, row: str, cells: Cells) -> None:
    """Waits of the host in a micro-batch, by what causes them."""
    model = bench.held.get(row)
    if model is None or bench.device.type != "cuda":
        reason = NOT_TRAINED if model is None else Reason(f"torch reports no waits for {bench.device.type}")
        cells |= dict.fromkeys(SYNC_COLUMNS, reason)
        return
    shape = bench.shapes[row]
    batch = batch_of(shape, bench.device, shape.full_samples)
    for mode in ("fast", "slow"):
        with cuda_syncs() as files:
            with devices.bfloat16(bench.device):
                loss = model(**batch, **MODES[mode], num_items_in_batch=100).loss
            loss.backward()
        ours = sum("/dualspeed/" in file and "/site-packages/" not in file.split("/dualspeed/")[-1] for file in files)
        cells |= {f"{mode}, ours": float(ours), f"{mode}, others'": float(len(files) - ours)}
        model.zero_grad()


SYNC_COLUMNS = ("fast, ours", "fast, others'", "slow, ours", "slow, others'")


@contextmanager
def cuda_syncs() -> Iterator[list[str]]:
    """File of the innermost frame outside torch at each wait for the GPU while the context is open."""
    files: list[str] = []
    outside = (str(Path(torch.__file__).parent), __file__, warnings.__file__)

    def note(message, category, filename, lineno, file=None, line=None) -> None:
        frame = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename.startswith(outside):
            frame = frame.f_back
        files.append("" if frame is None else frame.f_code.co_filename)

    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", message=".*synchronizing CUDA operation.*")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield files
        finally:
            torch.cuda.set_sync_debug_mode(before)


ANSWER_COLUMNS = ("full, one by one", "full, in batches", "pruned, one by one", "pruned, in batches", "GiB")


def answer_row(bench: Bench, row: str, cells: Cells) -> None:
    """Questions a second, answered with NEW_TOKENS tokens each, one by one and in batches."""
    model = bench.held.get(row)
    if model is None:
        cells |= dict.fromkeys(ANSWER_COLUMNS, NOT_TRAINED)
        return
    remove_adapters(model)
    model.eval().to(torch.bfloat16)
    is_older = restore(model.vlm)
    shape = bench.shapes[row]
    for name, mode in (("full", Mode.SLOW), ("pruned", Mode.FAST)):
        if mode is Mode.FAST and is_older:
            cells |= dict.fromkeys(ANSWER_COLUMNS[2:4], Reason(f"needs transformers {FIRST_VERSION}"))
            continue
        for label, samples in (("one by one", 1), ("in batches", shape.samples)):
            column = f"{name}, {label}"
            call = partial(answer, model, questions(shape, bench.device, samples), mode)
            with reasons(cells, [column]):
                memory = memory_cell(bench, call)
                cells[column] = samples / devices.timed(call, bench.device)
                if (name, samples) == ("full", shape.samples):
                    cells["GiB"] = memory
    bench.drop_models()


def questions(shape: Shape, device: torch.device, samples: int) -> dict[str, Tensor]:
    """Prompts of one length: the first sample's tokens with the pictures of all."""
    batch = batch_of(shape, device, samples)
    del batch["labels"]
    length = int(batch["attention_mask"][0].sum())
    row = batch["input_ids"][:1, :length]
    batch |= {"input_ids": row.repeat(samples, 1), "attention_mask": torch.ones_like(row).repeat(samples, 1)}
    if "image_grid_thw" in batch:
        batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE_TOKEN).int()
    return batch


@torch.no_grad()
def answer(model: DualSpeedModel, batch: dict[str, Tensor], mode: Mode) -> None:
    """Generate NEW_TOKENS tokens for each row."""
    lengths = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "pad_token_id": PAD_TOKEN}
    model.generate(**batch, mode=mode, do_sample=False, **lengths)


def remove_adapters(model: DualSpeedModel) -> None:
    """Put the linear layers back that adapters were built around."""
    for layer in model.vlm.get_decoder().layers:
        for name, module in list(layer.named_modules()):
            if isinstance(module, Adapted):
                setattr(layer.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], module.frozen)


INPUT_COLUMNS = ("images/s a core", "images/s all cores", "images/s needed", "cores needed")


def input_row(bench: Bench, row: str, cells: Cells) -> None:
    """Images a second that the processor prepares, and that the fast steps of this device take."""
    count = 4 if bench.is_toy else 32
    cores = min(2, devices.usable_cores()) if bench.is_toy else devices.usable_cores()
    # One pool serves all rows: its processes take seconds to import torch.
    pool = bench.held.setdefault("pool", ProcessPoolExecutor(cores, mp_context=get_context("spawn")))
    with tempfile.TemporaryDirectory() as folder:
        prepare = partial(prepared_a_second, row, Path(folder), count)
        cells["images/s a core"] = alone = pool.submit(prepare, 0).result()
        cells["images/s all cores"] = sum(pool.map(prepare, range(cores)))
    needed = bench.held.get(f"{bench.shapes[row].config} LoRA fast samples/s", NOT_TRAINED)
    cells |= {"images/s needed": needed, "cores needed": needed if isinstance(needed, Reason) else needed / alone}


def prepared_a_second(name: str, folder: Path, count: int, number: int) -> float:
    """Images a second of one thread: LLaVA's through the collator, Qwen's through the image processor alone."""
    torch.set_num_threads(1)
    own = folder / str(number)
    own.mkdir(exist_ok=True)
    examples = [example(own, index) for index in range(count)]
    if name.startswith("LLaVA"):
        prepare = ConversationCollator(processor_of("NeXT" in name))
    else:
        prepare = image_processor_of(name)
    prepare(examples[:2])
    start = time.perf_counter()
    prepare(examples)
    return count / (time.perf_counter() - start)


def image_processor_of(name: str) -> Callable[[list[dict]], object]:
    """Function that turns the pictures of rows into patches, as Qwen's processor does without torchvision."""
    side = 32 if name.startswith("Qwen3") else 28
    limits = {"shortest_edge": 4 * side**2, "longest_edge": 1024 * side**2}
    processor = Qwen2VLImageProcessorPil(patch_size=side // 2, merge_size=2, size=limits)
    return lambda rows: processor(images=[Image.open(row["images"][0]).convert("RGB") for row in rows])
