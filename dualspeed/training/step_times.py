"""Cost of a training step in each mode: seconds, memory, FLOPs and the pruner's seconds.

Measured in one process on one batch in memory. The modes take turns, so that other load on the machine affects all of
them alike; the medians are reported.
"""

import os
import platform
import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import load_from_disk
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoProcessor, BatchFeature

from dualspeed.chat_templates import use_template
from dualspeed.data.collator import ConversationCollator
from dualspeed.files import write_json
from dualspeed.method.checkpoint import load_vlm
from dualspeed.method.fast_mode import PrunerResult, observe_pruning
from dualspeed.method.model import DualSpeedModel
from dualspeed.settings.modes import Mode
from dualspeed.settings.speed import SpeedSettings
from dualspeed.training.trainable import set_trainable

Step = Callable[[], None]


def measure_speed(model_folder: Path, data_folder: Path, out: Path, settings: SpeedSettings) -> None:
    """Time Baseline's, fast and slow steps on one batch of the training data and write them to `out` as JSON.

    A step is vision tower, pruner, forward, backward, gradient clipping and AdamW. The number of CPU threads is that of
    `settings`, whatever the environment says.
    """
    torch.set_num_threads(settings.threads)
    model = DualSpeedModel(load_vlm(model_folder), settings.dualspeed)
    set_trainable(model, "finetune")
    batch = training_batch(model, model_folder, data_folder, settings.chat_template, settings.batch_size)
    batch = batch.to(model.device)
    steps = training_steps(model, dict(batch))
    seconds, pruner_seconds = time_in_turns(model, steps, settings.repeats)
    flops = {name: count_flops(step) for name, step in steps.items()}
    write_json(
        out,
        {f"{name}_step_seconds": statistics.median(values) for name, values in seconds.items()}
        | {f"{name}_flops": value for name, value in flops.items()}
        | {
            "theory_u": flops["fast"] / flops["baseline"],
            "pruner_seconds": statistics.median(pruner_seconds),
            "peak_memory_bytes": peak_memory_bytes(),
            "batch_size": settings.batch_size,
            "sequence_length": batch["input_ids"].shape[1],
            "repeats": settings.repeats,
            "threads": torch.get_num_threads(),
            "machine": machine(),
        },
    )


def training_batch(
    model: DualSpeedModel, model_folder: Path, data_folder: Path, chat_template: str, batch_size: int
) -> BatchFeature:
    """Collated batch of the first `batch_size` samples of a prepared dataset."""
    processor = AutoProcessor.from_pretrained(model_folder)
    use_template(processor, chat_template)
    dataset = load_from_disk(data_folder)
    collate = ConversationCollator(processor, question_tokenizer=model.question_tokenizer(processor))
    return collate([dataset[i] for i in range(min(batch_size, len(dataset)))])


def training_steps(model: DualSpeedModel, batch: dict[str, Any]) -> dict[str, Step]:
    """Functions that run a step of each mode on the same weights.

    The learning rate is 0, so that the weights stay as they are; a step costs as much as with any other.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)  # the trainer's default

    def step(**mode: Any) -> None:
        optimizer.zero_grad()
        model(**batch, **mode).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return {
        "baseline": lambda: step(mode=Mode.SLOW, distill=False),
        "fast": lambda: step(mode=Mode.FAST),
        "slow": lambda: step(mode=Mode.SLOW),
    }


def time_in_turns(
    model: DualSpeedModel, steps: dict[str, Step], repeats: int
) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of each repetition by step, and the pruner's seconds of each fast step, after one warm-up round."""
    model.train()
    seconds = defaultdict(list)
    pruner_seconds = []
    for repetition in range(repeats + 1):
        for name, step in steps.items():
            with time_pruner(model) as in_pruner:
                elapsed = timed(step)
            if repetition > 0:
                seconds[name].append(elapsed)
                if name == "fast":
                    pruner_seconds.append(sum(in_pruner))
    return dict(seconds), pruner_seconds


def timed(function: Callable[[], Any]) -> float:
    """Seconds of a call, including work that it leaves queued on a GPU."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


@contextmanager
def time_pruner(model: DualSpeedModel) -> Iterator[list[float]]:
    """List that gets the seconds of each call of the model's pruner while the context is open."""
    seconds: list[float] = []

    def time_call(prune: Callable[[], PrunerResult], _: Any) -> PrunerResult:
        synchronize()
        start = time.perf_counter()
        result = prune()
        synchronize()
        seconds.append(time.perf_counter() - start)
        return result

    with observe_pruning(model, time_call):
        yield seconds


def count_flops(step: Step) -> int:
    """FLOPs of a step by torch's counter, with attention as matrix products, since it counts no fused attention."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step()
    return counter.get_total_flops()


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory_bytes() -> int:
    """Peak memory of this process: allocated on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def machine() -> str:
    """Name of the GPU, or of the processor with its number of cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
