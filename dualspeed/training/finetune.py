"""One finetuning from a command, without a workflow: checked first, resumed by being run again, and told at the end.

The output folder holds the stock trainer's checkpoints, the finished model, and FILE with settings and result. It
belongs to one run: other settings are refused.
"""

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from dualspeed.data.annotations import parquet_files, read_entries
from dualspeed.data.row_sources import SAVED, SAVED_SPLITS, TRAIN, in_one_line, load_saved
from dualspeed.device import machine, peak_memory_bytes
from dualspeed.errors import ConfigError, DownloadError, DualSpeedError, ModelError, ResultsError
from dualspeed.files import write_json
from dualspeed.settings.finetune import FinetuneRun, FinetuneSettings
from dualspeed.settings.modes import Mode
from dualspeed.settings.reading import quote
from dualspeed.training.resume import EndsAtLastStep
from dualspeed.training.state import PROGRESS, check_num_processes, check_sharding, last_checkpoint, read_progress
from dualspeed.training.step_times import HELD_STILL, time_steps
from dualspeed.training.trainable import hold_trained_weights_in_float32
from dualspeed.training.trainer import load_for_training

if TYPE_CHECKING:
    from dualspeed.training.trainer import DualSpeedTrainer

FILE = "finetune.json"
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
NUM_KEPT = 2
NUM_BATCHES, REPEATS = 4, 3
"""Batches that `compare` times steps on, and steps of each kind on each of them."""


class KeepsTime(TrainerCallback):
    """Writes the seconds of all starts, and how processes share the work, beside each checkpoint."""

    def __init__(self, trainer: "DualSpeedTrainer", before: float) -> None:
        self.trainer = trainer
        self._started = time.monotonic() - before

    def seconds(self) -> float:
        """Seconds since the first start, without pauses between starts."""
        return time.monotonic() - self._started

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the file."""
        if state.is_world_process_zero:
            progress = {"seconds": self.seconds(), "num_processes": args.world_size, "sharding": self.trainer.sharding}
            write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / PROGRESS, progress)


def finetune(settings: FinetuneSettings) -> None:
    """Train, or go on training, and print what was saved and what it cost; a finished run is told again.

    Raises:
        DualSpeedError: something that the options ask for can't be, or the folder holds another run.
    """
    folder, is_first = Path(settings.run.output_dir), int(os.environ.get("RANK", "0")) == 0
    check_machine(settings)
    args = make_arguments(settings)
    result = open_run(folder, settings, is_first)
    is_timed = not settings.run.compare or "compared" in (result or {})
    if result is None or not is_timed:
        trainer = make_trainer(settings, args)
        result = result or train(trainer, folder)
        note(folder, settings, result, is_first)
        if not is_timed:
            note(folder, settings, result | {"compared": compare(trainer, sum(result["steps"].values()))}, is_first)
    if is_first:
        print(told(folder, json.loads((folder / FILE).read_text(encoding="utf-8"))["result"]))


def note(folder: Path, settings: FinetuneSettings, result: dict[str, Any], is_first: bool) -> None:
    """Write a finished run's result to FILE."""
    if is_first:
        write_json(folder / FILE, {"settings": settings.flat(), "result": result})


def check_machine(settings: FinetuneSettings) -> None:
    """Raise ConfigError for what only a GPU can do, where there is none."""
    asked = {name: settings.training_arguments.get(name) for name in ("bf16", "fp16", "tf32")}
    asked["lora_quantize"] = settings.lora is not None and settings.lora.quantize
    names = [name for name, is_asked in asked.items() if is_asked]
    may_use_cpu = settings.training_arguments.get("use_cpu") and not asked["lora_quantize"]
    if names and not may_use_cpu and not torch.accelerator.is_available():
        raise ConfigError(f"{names[0]}: needs a GPU, and torch finds none; valid: without it, or with --use_cpu")
    if settings.run.compare and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("compare: times the steps of one process; valid: without it, where several train")


def make_arguments(settings: FinetuneSettings) -> TrainingArguments:
    """Make the training arguments; two checkpoints are kept unless the options say otherwise."""
    folder = settings.run.output_dir
    try:
        return TrainingArguments(**{"output_dir": folder, "save_total_limit": NUM_KEPT} | settings.training_arguments)
    except (ValueError, TypeError, ImportError, KeyError) as error:
        raise ConfigError(f"training arguments: {in_one_line(error)}") from error


def open_run(folder: Path, settings: FinetuneSettings, is_first: bool) -> dict[str, Any] | None:
    """Result of a finished run of these settings in a folder; None if it is to be trained.

    Raises:
        ResultsError: the folder holds a run of other settings, or other files.
    """
    file, flat = folder / FILE, settings.flat()
    if not file.exists():
        others = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        if others and is_first:
            raise ResultsError(f"{folder}: holds {others[0]}, which is of no such run; valid: a new or empty folder")
        if is_first:
            write_json(file, {"settings": flat})
        return None
    held = json.loads(file.read_text(encoding="utf-8"))
    for name in sorted(held["settings"].keys() | flat.keys()):
        before, now = (values.get(name, default_of(name)) for values in (held["settings"], flat))
        if before != now:
            valid = "valid: the same settings, or another --output-dir"
            raise ResultsError(f"{folder}: holds a run with {name} {quote(before)}, not {quote(now)}; {valid}")
    return held.get("result")


def default_of(name: str) -> Any:
    """Default of a field of TrainingArguments; None for a name that is none."""
    field = TrainingArguments.__dataclass_fields__.get(name)
    if field is None:
        return None
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def make_trainer(settings: FinetuneSettings, args: TrainingArguments) -> EndsAtLastStep:
    """Make the trainer, with all checks of model and data."""
    run = settings.run
    model, rows = load_model(settings, args), load_rows(run, run.split)
    evaluated = None if run.eval_split is None else load_rows(run, run.eval_split)
    try:
        trainer = EndsAtLastStep(
            model=model,
            args=args,
            train_dataset=rows,
            eval_dataset=evaluated,
            dualspeed=settings.dualspeed,
            max_length=run.max_length,
            projector_learning_rate=run.projector_learning_rate,
            vision_learning_rate=run.vision_learning_rate,
            slow_batch_size=run.slow_batch_size,
            cache_features=run.cache_features,
            tokens_per_batch=run.tokens_per_batch,
            slow_tokens_per_batch=run.slow_tokens_per_batch,
            packing=run.packing,
        )
    except DualSpeedError:
        raise
    except (ValueError, ImportError) as error:  # of the stock trainer, for arguments that don't go together
        raise ConfigError(f"training arguments: {in_one_line(error)}") from error
    if not trainer.is_deepspeed_enabled:
        hold_trained_weights_in_float32(trainer.model)
    return trainer


def load_model(settings: FinetuneSettings, args: TrainingArguments) -> PreTrainedModel:
    """Load the stock model, with adapters if they are asked for."""
    attention = {"attn_implementation": settings.run.attn_implementation}
    try:
        if settings.lora is None:
            return load_for_training(settings.run.model, args, **attention)
        from dualspeed.method import adapters  # needs peft

        vlm = load_for_training(settings.run.model, args, **attention, **adapters.quantization(settings.lora))
    except DualSpeedError:
        raise
    except Exception as error:  # of any kind: those of HTTP clients, of the Hub, of transformers
        raise ModelError(f"--model {settings.run.model}: can't be loaded: {in_one_line(error)}") from error
    set_seed(args.seed)  # draws the adapters' first weights
    adapters.add_adapters(vlm, settings.lora)
    return vlm


def load_rows(run: FinetuneRun, split: str | None) -> Any:
    """Rows of the data, which `DualSpeedTrainer` reads in any format.

    Raises:
        AnnotationsError, DownloadError: they can't be read.
    """
    path = Path(run.data)
    if path.exists() and run.data_config is not None:
        raise ConfigError(f"data_config: {run.data_config!r} with files; valid: with a dataset of the Hub")
    if run.images is not None and path.suffix not in JSON_SUFFIXES:
        raise ConfigError(f"images: has no effect on {run.data}; valid: with JSON files, whose image paths start there")
    if (path / SAVED).is_file() or (path / SAVED_SPLITS).is_file():
        return load_saved(path, split)
    if path.exists() and split is not None:
        raise ConfigError(f"split: {split!r} of {path}, which has none; valid: null")
    if path.suffix in JSON_SUFFIXES:
        rows = [entry.value for entry in read_entries(path)]
        return rows if run.images is None else placed(rows, run.images)
    import datasets  # comes with the workflow

    try:
        if path.exists():
            files = [str(file) for file in parquet_files(path)]
            return datasets.load_dataset("parquet", data_files=files, split=TRAIN)
        return datasets.load_dataset(run.data, run.data_config, split=split or TRAIN)
    except DualSpeedError:
        raise
    except Exception as error:  # of any kind: those of HTTP clients, of the Hub, and of each file format
        valid = "valid: a file, a folder, or a dataset of the Hub with its configuration and split"
        raise DownloadError(f"--data {run.data}: can't be loaded: {in_one_line(error)}; {valid}") from error


def placed(rows: Sequence[Any], folder: str) -> list[Any]:
    """Rows whose image paths start from a folder."""

    def path_of(value: Any) -> Any:
        if isinstance(value, list):
            return [path_of(item) for item in value]
        return os.path.join(folder, value) if isinstance(value, str) else value

    return [
        {name: path_of(value) if name in ("image", "images") else value for name, value in row.items()}
        if isinstance(row, dict)
        else row
        for row in rows
    ]


def train(trainer: EndsAtLastStep, folder: Path) -> dict[str, Any]:
    """Train from the last whole checkpoint, save the model, and return what it cost."""
    checkpoint = last_checkpoint(folder)
    check_num_processes(checkpoint, trainer.args.world_size)
    check_sharding(checkpoint, trainer.sharding)
    clock = KeepsTime(trainer, read_progress(checkpoint).get("seconds", 0.0))
    trainer.add_callback(clock)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_model(str(folder))
    steps = trainer.state.global_step
    slow = sum(trainer.mode_of_step(step) is Mode.SLOW for step in range(steps))
    return {
        "seconds": clock.seconds(),
        "steps": {"fast": steps - slow, "slow": slow},
        "num_processes": trainer.args.world_size,
        "peak_memory_bytes": peak_memory_bytes(trainer.args.device),
        "machine": machine(trainer.args.device),
    }


def compare(trainer: EndsAtLastStep, num_steps: int) -> dict[str, float]:
    """Seconds of a step of each kind on the same batches, and how many times faster than full-token steps a step is.

    Args:
        num_steps: steps of the training whose mean step is compared.
    """
    model = trainer.inner_model
    with TemporaryDirectory() as folder:
        still = dataclasses.replace(trainer.args, output_dir=folder, report_to=[], eval_strategy="no", **HELD_STILL)
        timer = EndsAtLastStep(
            model=model,
            args=still,
            train_dataset=trainer.train_dataset,
            data_collator=trainer.data_collator,
            slow_batch_size=trainer.slow_batch_size,
            tokens_per_batch=trainer.token_budgets and trainer.token_budgets.fast,
            slow_tokens_per_batch=trainer.token_budgets and trainer.token_budgets.slow,
            packing=trainer.packing,
        )
        clock, _ = time_steps(timer, NUM_BATCHES, REPEATS)
    seconds = {f"{kind}_step_seconds": clock.mean_seconds(kind) for kind in ("baseline", "fast", "slow")}
    share = model.dualspeed.slow_share(num_steps)
    mean = (1 - share) * seconds["fast_step_seconds"] + share * seconds["slow_step_seconds"]
    return seconds | {"ratio": seconds["baseline_step_seconds"] / mean}


def told(folder: Path, result: dict[str, Any]) -> str:
    """Lines that say what was saved and what it cost."""
    beside = [name for name in ("mode_isolator.safetensors", "adapter") if (folder / name).exists()]
    steps = result["steps"]
    lines = [
        f"saved: {folder}, a stock checkpoint" + (f" with {' and '.join(beside)} beside it" if beside else ""),
        f"cost: {result['seconds']:.0f} s on {result['num_processes']} x {result['machine']}, {steps['fast']} fast and "
        f"{steps['slow']} slow steps, peak memory {result['peak_memory_bytes'] / 2**30:.1f} GiB",
    ]
    if found := result.get("compared"):
        lines.append(
            f"compared: a step on full tokens takes {found['baseline_step_seconds']:.3f} s, a fast one "
            f"{found['fast_step_seconds']:.3f} s, a slow one {found['slow_step_seconds']:.3f} s; on the same batches "
            f"this training's steps are {found['ratio']:.2f} times faster"
        )
    return "\n".join(lines)
