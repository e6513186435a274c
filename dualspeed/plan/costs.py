"""Cost of one stage of one row: FLOPs, memory, hours and disk."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from dualspeed.errors import ConfigError
from dualspeed.layout import Layout
from dualspeed.plan.flops import Sample, Trained, step_flops, trained_parameters, visual_flops
from dualspeed.plan.memory import ERROR, RESERVED, Peak, peak_memory
from dualspeed.plan.shapes import ModelShape, shape_of
from dualspeed.plan.towers import Encoded
from dualspeed.settings.plan import DatasetEstimate, Gpu
from dualspeed.settings.project import Project
from dualspeed.settings.recipe import Recipe, batch_plan
from dualspeed.settings.resources import JobResources
from dualspeed.settings.sharding import read_sharding
from dualspeed.settings.stage import StageSettings


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Training processes, one on each GPU."""

    num_gpus: int
    """GPUs over all nodes."""
    sharding: str
    """One of SHARDINGS: ddp, zero2, zero3, fsdp2."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Lengths of a dataset's samples."""

    samples: int
    """Number of samples."""
    kinds: tuple[tuple[float, Sample], ...]
    """(share of the samples, mean sample) of each kind: with an image, without."""
    longest: Sample
    """Longest sample, which decides the peak memory."""
    is_counted: bool
    """True if preparation has counted samples and tokens, False if they are assumed."""

    def mean(self, name: str) -> float:
        """Mean of a field over the samples."""
        return sum(share * getattr(sample, name) for share, sample in self.kinds)


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """Cost of one stage of training."""

    lengths: Lengths
    """Samples that it trains on."""
    processes: Processes
    """Processes that it trains in."""
    flops: float
    """FLOPs of all its steps."""
    baseline_flops: float
    """FLOPs of the same stage with full tokens in every step."""
    tower_share: float
    """Share of vision tower and projector in the FLOPs of a fast step."""
    cap: float
    """Speedup if fast mode dropped all visual tokens, which no pruning ratio exceeds: tower and text remain."""
    peak: Peak
    """Peak memory of a process."""
    checkpoint_bytes: float
    """Disk space of the trained model."""
    state_bytes: float
    """Disk space of the checkpoints to resume from, while it trains."""
    kept_bytes: float
    """Disk space of the features that `cache_features` keeps, if no two samples show the same image."""

    @property
    def memory(self) -> float:
        """Bytes of memory that each GPU needs."""
        return self.peak.total + RESERVED

    def fits(self, gpu: Gpu) -> bool:
        """True if the memory that is needed leaves room on this GPU for what the arithmetic may be wrong by."""
        return self.memory * (1 + ERROR) <= gpu.memory

    def hours(self, gpu: Gpu, utilisation: float) -> float:
        """Wall-clock hours."""
        return self.flops / (self.processes.num_gpus * gpu.flops * utilisation) / 3600


def processes_of(recipe: Recipe, wanted: JobResources) -> Processes:
    """Number of processes from a job's resources, and their sharding from the recipe's file for accelerate."""
    return Processes(num_gpus=wanted.num_processes, sharding=read_sharding(recipe.accelerate_config).strategy)


def trained_by(settings: StageSettings) -> Trained:
    """Trained parts of the model in a stage."""
    recipe, arguments = settings.recipe, settings.recipe.training_arguments
    return Trained(
        language=settings.stage == "finetune",
        vision=recipe.vision_learning_rate is not None,
        lora_rank=recipe.lora.rank if recipe.lora else 0,
        lora_dropout=bool(recipe.lora and recipe.lora.dropout),
        checkpointing=bool(arguments.get("activation_checkpointing") or arguments.get("gradient_checkpointing")),
    )


def lengths_of(project: Project, settings: StageSettings, shape: ModelShape, prepared: Path) -> Lengths:
    """Samples and tokens of a stage: as counted if its data is prepared, else as assumed in `plan.datasets`."""
    name = settings.recipe.data_name
    if name not in project.plan.datasets:
        known = ", ".join(project.plan.datasets) or "none"
        raise ConfigError(
            f"plan.datasets: no entry for {name!r}, whose lengths the cost follows from; there are: {known}"
        )
    estimate = project.plan.datasets[name]
    manifest = prepared / "manifest.json"
    if manifest.is_file():
        estimate = counted(estimate, json.loads(manifest.read_text(encoding="utf-8")), shape)
    text_only = estimate.text_only_tokens or estimate.text_tokens
    kinds = [(estimate.image_share, sample_of(settings, shape, estimate, estimate.text_tokens))]
    if estimate.image_share < 1:
        kinds.append((1 - estimate.image_share, sample_of(settings, shape, estimate, text_only, has_image=False)))
    return Lengths(
        samples=estimate.samples,
        kinds=tuple(kinds),
        longest=longest_sample(settings, shape, estimate),
        is_counted=manifest.is_file(),
    )


def counted(estimate: DatasetEstimate, manifest: dict, shape: ModelShape) -> DatasetEstimate:
    """Replace the estimate's lengths by those that preparation counted; text tokens are all but the images' tokens."""
    mean = manifest["num_tokens"] / manifest["num_samples"]
    image = shape.visual_tokens(*estimate.image_size) + shape.tower.markers(*estimate.image_size)
    text = max(1, round(mean - estimate.image_share * image))
    supervised = max(1, round(estimate.supervised_tokens * text / estimate.text_tokens))
    return dataclasses.replace(
        estimate,
        samples=manifest["num_samples"],
        text_tokens=text,
        supervised_tokens=supervised,
        text_only_tokens=None,
    )


def sample_of(
    settings: StageSettings, shape: ModelShape, estimate: DatasetEstimate, text: int, has_image: bool = True
) -> Sample:
    """Sample with `text` tokens and, if `has_image`, an image; cut at max_length."""
    method, size, longest = settings.dualspeed, estimate.image_size, settings.recipe.max_length
    visual, markers = (shape.visual_tokens(*size), shape.tower.markers(*size)) if has_image else (0, 0)
    if visual + markers >= longest:
        raise ConfigError(
            f"max_length: {longest}, and an image of {size[0]} x {size[1]} pixels has {visual + markers} tokens; "
            "valid: more, or smaller images in plan.datasets"
        )
    text = min(text, longest - visual - markers)
    kept = shape.kept_tokens(*size, method.pruning_ratio, method.num_virtual_tokens, method.prune_budget)
    return Sample(
        full_tokens=text + visual + markers,
        fast_tokens=text + (kept + markers if has_image else 0),
        supervised_tokens=round(text * estimate.supervised_tokens / estimate.text_tokens),
        visual_tokens=visual,
        encoded=shape.encoded(*size) if has_image else Encoded(),
    )


def longest_sample(settings: StageSettings, shape: ModelShape, estimate: DatasetEstimate) -> Sample:
    """Longest sample in each mode: the longest text with the largest image.

    If some samples have no image, its length in fast mode is that of the longest text alone, which no pruning shortens.
    """
    size = shape.tower.largest(estimate.largest_image_size or estimate.image_size)
    largest = dataclasses.replace(estimate, image_size=size)
    text = estimate.longest_text_tokens or settings.recipe.max_length
    with_image = sample_of(settings, shape, largest, text)
    if estimate.image_share == 1:
        return with_image
    alone = sample_of(settings, shape, largest, text, has_image=False)
    return dataclasses.replace(with_image, fast_tokens=alone.fast_tokens, supervised_tokens=alone.supervised_tokens)


def stage_cost(project: Project, settings: StageSettings, model: str) -> StageCost:
    """Cost of a stage that trains `model`, a key of the project's models."""
    shape = shape_of(project.models[model], project.downloads)
    lengths = lengths_of(project, settings, shape, Path(Layout(project.results).prepared(model, settings.stage)))
    wanted = project.models[model].resources_of(settings.stage)
    recipe, trained, processes = settings.recipe, trained_by(settings), processes_of(settings.recipe, wanted)
    batch = recipe.per_device_batch_size or recipe.global_batch_size // processes.num_gpus
    batch_plan(recipe.global_batch_size, processes.num_gpus, batch)
    num_passes = recipe.training_arguments.get("num_train_epochs", 3)
    if (max_steps := recipe.training_arguments.get("max_steps", -1)) > 0:
        num_passes = max_steps * recipe.global_batch_size / lengths.samples
    modes = modes_of(settings, num_passes * lengths.samples / recipe.global_batch_size)
    batches = {mode: batch if mode == "fast" else recipe.slow_per_device_batch_size or batch for mode in modes}
    for mode in modes if (budgets := recipe.token_budgets) else ():
        budget = budgets["fast" if mode == "fast" else "slow"]
        longest = lengths.longest.fast_tokens if mode == "fast" else lengths.longest.full_tokens
        batches[mode] = min(batch, max(1, budget // longest))
    peak = peak_memory(
        shape,
        lengths.longest,
        trained,
        batches,
        sharding=processes.sharding,
        num_gpus=processes.num_gpus,
        accumulates=min(batches.values()) * processes.num_gpus < recipe.global_batch_size,
    )

    def flops(modes: dict[str, float], kinds: tuple[tuple[float, Sample], ...] = lengths.kinds) -> float:
        return num_passes * lengths.samples * sum(
            part * share * step_flops(shape, sample, trained, mode)
            for mode, part in modes.items()
            for share, sample in kinds
        )  # fmt: skip

    text_alone = tuple(
        (share, dataclasses.replace(sample, fast_tokens=sample.full_tokens - sample.visual_tokens))
        for share, sample in lengths.kinds
    )
    in_tower = sum(share * visual_flops(sample, trained) for share, sample in lengths.kinds)
    baseline_flops = flops({"baseline": 1.0})
    num_parameters = sum(shape.parameters.values())
    return StageCost(
        lengths=lengths,
        processes=processes,
        flops=flops(modes),
        baseline_flops=baseline_flops,
        tower_share=num_passes * lengths.samples * in_tower / flops({"fast": 1.0}),
        cap=baseline_flops / flops(modes, text_alone),
        peak=peak,
        checkpoint_bytes=2 * num_parameters,
        # Two checkpoints are kept while a third is written. Each has bfloat16 weights; those that are trained are
        # float32 (2 bytes more) with two float32 moments.
        state_bytes=3 * (2 * num_parameters + 10 * trained_parameters(shape, trained)),
        kept_bytes=lengths.samples * sum(share * sample.encoded.kept_bytes for share, sample in lengths.kinds),
    )


def modes_of(settings: StageSettings, num_steps: float) -> dict[str, float]:
    """Share of a stage's steps in each mode."""
    ratio, distills = settings.dualspeed.slow_share(num_steps), settings.dualspeed.distillation_weight > 0
    shares = {"fast": 1 - ratio, "slow" if distills else "baseline": ratio}
    return {mode: share for mode, share in shares.items() if share > 0}
