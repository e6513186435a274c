"""Cost of a training step in each mode: seconds, memory, FLOPs and the pruner's seconds.

The recipe's own trainer runs the steps, so that precision, adapters, checkpointing, micro-batches, batches and device
are those of the training. The modes take turns on the same batches, so that other load on the machine affects all of
them alike. A step's time begins when its batch is on the device.
"""

import dataclasses
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import load_from_disk
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dualspeed.device import best_device, machine, peak_memory_bytes, synchronize
from dualspeed.errors import ConfigError
from dualspeed.files import write_json
from dualspeed.method.fast_mode import PrunerResult, observe_pruning
from dualspeed.method.model import DualSpeedModel
from dualspeed.settings.modes import Mode
from dualspeed.settings.speed import SpeedSettings
from dualspeed.settings.stage import StageSettings
from dualspeed.training.drawn_batches import OnceCollated, drawn_batches
from dualspeed.training.stage import load_model, make_trainer
from dualspeed.training.trainer import DualSpeedTrainer

MODES = {"baseline": Mode.SLOW, "fast": Mode.FAST, "slow": Mode.SLOW}
"""Name of a timed kind of step -> the mode that it runs in; Baseline's steps have no teacher."""
PRUNER = "pruner"
"""Fast steps of their own, whose pruner is timed: the waits around it would slow other steps down."""
PRECISIONS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
HELD_STILL = {
    "learning_rate": 0.0,  # weights stay as they are; a step costs as much as with any other
    "lr_scheduler_type": "constant",
    "dataloader_pin_memory": False,  # batches are on the device before their steps begin
    "logging_strategy": "no",
    "save_strategy": "no",
    "disable_tqdm": True,
}
"""Training arguments of a measurement, beside the recipe's."""


@dataclasses.dataclass(frozen=True)
class TimedStep:
    """One optimizer step of a measurement."""

    kind: str
    """A name in MODES, or PRUNER."""
    batch: int
    """Number of its batch."""
    purpose: str = "time"
    """`warm up`, `time`, or `count` its FLOPs."""


def measure_speed(
    model_folder: Path,
    data_folder: Path,
    out: Path,
    settings: SpeedSettings,
    num_processes: int = 1,
    is_sharded: bool = False,
) -> None:
    """Time Baseline's, fast and slow steps on batches of the training data and write them to `out` as JSON.

    A step is that of one process: its micro-batches through vision tower, pruner, forward and backward pass, then
    gradient clipping and the optimizer. Times are means over the batches of the medians over `repeats`. The number of
    CPU threads is that of `settings`, whatever the environment says.

    Args:
        num_processes: processes that the recipe trains in; each takes its share of the global batch.
        is_sharded: True if they share weights and optimizer state (FSDP, ZeRO), so that one of them would not fit all.

    Raises:
        ConfigError: the steps don't fit into the device's memory.
    """
    torch.set_num_threads(settings.threads)
    stage = timed_stage(settings, num_processes)
    with TemporaryDirectory() as folder:
        model, processor = load_model(stage, model_folder)
        dataset = load_from_disk(data_folder)
        trainer = make_trainer(stage, model, processor, dataset, None, Path(folder) / "state", time.monotonic())
        if is_sharded:
            hold_share(trainer, num_processes)
        clock, collate = time_steps(trainer, settings.num_batches, settings.repeats)
    args, flops = trainer.args, clock.mean_flops()
    write_json(
        out,
        {f"{kind}_step_seconds": clock.mean_seconds(kind) for kind in MODES}
        | {f"{kind}_flops": value for kind, value in flops.items()}
        | {
            "theory_u": flops["fast"] / flops["baseline"],
            "pruner_seconds": clock.mean_seconds(PRUNER),
            "data_seconds": collate.mean_seconds() * args.gradient_accumulation_steps,
            "peak_memory_bytes": clock.peak_memory_bytes,
            "batch_size": args.per_device_train_batch_size,
            "slow_batch_size": trainer.slow_batch_size or args.per_device_train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "num_processes": num_processes,
            "updated_share": 1 / num_processes if is_sharded else 1.0,
            "sequence_length": round(collate.mean_length()),
            "num_batches": settings.num_batches,
            "repeats": settings.repeats,
            "threads": torch.get_num_threads(),
            "precision": PRECISIONS[trainer.accelerator.mixed_precision],
            "device": args.device.type,
            "machine": machine(args.device),
        },
    )


def timed_stage(settings: SpeedSettings, num_processes: int) -> StageSettings:
    """The finetuning of one of `num_processes` processes, with the training arguments of a measurement."""
    recipe = dataclasses.replace(
        settings.recipe,
        global_batch_size=settings.recipe.global_batch_size // num_processes,
        training_arguments=settings.recipe.training_arguments | HELD_STILL,
    )
    return StageSettings(stage="finetune", seed=0, recipe=recipe, dualspeed=settings.dualspeed)


def hold_share(trainer: DualSpeedTrainer, num_processes: int) -> None:
    """Make a trainer hold what one of several processes that share the model works with.

    The weights come in the precision that they are computed in, and the optimizer updates one of `num_processes` equal
    shares of them.
    """
    if trainer.args.bf16:
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    for group in trainer.create_optimizer().param_groups:
        by_size = sorted(group["params"], key=torch.Tensor.numel, reverse=True)
        group["params"] = by_size[::num_processes]


def time_steps(trainer: DualSpeedTrainer, num_batches: int, repeats: int) -> tuple["StepClock", OnceCollated]:
    """Run the steps of a measurement; the clock has their times, the collator the batches."""
    batches = drawn_batches(trainer, num_batches)
    clock = StepClock(trainer, steps_in_turns(num_batches, repeats))
    collate = OnceCollated(trainer.data_collator)
    trainer.data_collator, trainer.args.train_sampling_strategy = collate, "sequential"
    trainer.train_dataset = [
        row for step in clock.steps for row in batches["baseline" if step.kind == "baseline" else "pruned"][step.batch]
    ]
    trainer.args.max_steps = len(clock.steps)
    trainer.mode_of_step = clock.mode_of_step  # type: ignore[method-assign]
    trainer.add_callback(clock)
    try:
        trainer.train()
    except torch.OutOfMemoryError as error:
        fast, slow = trainer.args.per_device_train_batch_size, trainer.slow_batch_size
        given, fewer = f"per_device_batch_size: {fast}, slow_per_device_batch_size: {slow}", "samples"
        if budgets := trainer.token_budgets:
            given, fewer = f"tokens_per_batch: {budgets.fast}, slow_tokens_per_batch: {budgets.slow}", "tokens"
        raise ConfigError(
            f"{given}: their steps don't fit into the memory of {machine(trainer.args.device)}; valid: fewer {fewer}, "
            "or a device with more memory"
        ) from error
    return clock, collate


def steps_in_turns(num_batches: int, repeats: int) -> list[TimedStep]:
    """Steps of a measurement in their order: a round to warm up, the timed ones, and those whose FLOPs are counted."""
    timed = [(kind, batch) for _ in range(repeats) for batch in range(num_batches) for kind in (*MODES, PRUNER)]
    return [
        *(TimedStep(kind, 0, "warm up") for kind in MODES),
        *(TimedStep(kind, batch) for kind, batch in timed),
        # Last, since their attention takes the memory of matrix products.
        *(TimedStep(kind, batch, "count") for batch in range(num_batches) for kind in MODES),
    ]


class StepClock(TrainerCallback):
    """Times the steps of a trainer from the first micro-batch to the end of the update."""

    def __init__(self, trainer: DualSpeedTrainer, steps: Sequence[TimedStep]) -> None:
        self.steps = steps
        self.peak_memory_bytes = 0
        """Peak of the steps before those whose FLOPs are counted."""
        self._model: DualSpeedModel = trainer.model
        self._device = trainer.args.device
        self._seconds: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._flops: dict[str, list[int]] = defaultdict(list)

    def mode_of_step(self, step: int) -> Mode:
        """Mode of the optimizer step `step`, from 0."""
        return MODES.get(self.steps[step].kind, Mode.FAST)

    def mean_seconds(self, kind: str) -> float:
        """Mean over the batches of the median over a batch's repetitions."""
        return statistics.mean(statistics.median(values) for values in self._seconds[kind].values())

    def mean_flops(self) -> dict[str, float]:
        """FLOPs of a step by name in MODES, mean over the batches."""
        return {kind: statistics.mean(values) for kind, values in self._flops.items()}

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prepare what the step needs, and start its time."""
        self._step = self.steps[state.global_step]
        self._contexts = ExitStack()
        if self._step.kind == "baseline":
            self._contexts.enter_context(without_teacher(self._model))
        if self._step.kind == PRUNER:
            self._in_pruner = self._contexts.enter_context(time_pruner(self._model))
        if self._step.purpose == "count":
            self._counter = self._contexts.enter_context(flop_counter(self._device))
        else:
            synchronize(self._device)
            self._started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record what the step took."""
        if self._step.purpose == "count":
            self._flops[self._step.kind].append(self._counter.get_total_flops())
        else:
            synchronize(self._device)
            seconds = time.perf_counter() - self._started
            self.peak_memory_bytes = peak_memory_bytes(self._device)
            if self._step.purpose == "time":
                taken = sum(self._in_pruner) if self._step.kind == PRUNER else seconds
                self._seconds[self._step.kind][self._step.batch].append(taken)
        self._contexts.close()


@contextmanager
def without_teacher(model: DualSpeedModel) -> Iterator[None]:
    """Slow steps are Baseline's while the context is open."""
    settings = model.dualspeed
    model.dualspeed = dataclasses.replace(settings, distillation_weight=0.0)
    try:
        yield
    finally:
        model.dualspeed = settings


def timed(function: Callable[[], Any]) -> float:
    """Seconds of a call, including work that it leaves queued on the accelerator."""
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
        synchronize(model.device)
        start = time.perf_counter()
        result = prune()
        synchronize(model.device)
        seconds.append(time.perf_counter() - start)
        return result

    with observe_pruning(model, time_call):
        yield seconds


@contextmanager
def flop_counter(device: torch.device) -> Iterator[FlopCounterMode]:
    """Counter of torch's FLOPs while the context is open; it knows the fused attention of CUDA and ROCm alone.

    On other devices attention is computed as matrix products.
    """
    attention = nullcontext() if device.type == "cuda" else sdpa_kernel(SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, attention:
        yield counter


def count_flops(step: Callable[[], Any]) -> int:
    """FLOPs of a call."""
    with flop_counter(best_device()) as counter:
        step()
    return counter.get_total_flops()
