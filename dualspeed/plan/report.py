"""Text of `dualspeed plan`: the costs of a sheet as one table, and an error for each stage that doesn't fit."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from dualspeed.errors import ConfigError, PlanError
from dualspeed.plan.costs import StageCost, stage_cost
from dualspeed.plan.memory import ERROR
from dualspeed.plan.remedies import remedies
from dualspeed.settings.plan import GPUS
from dualspeed.settings.project import Project, load_project
from dualspeed.settings.sheet import Row
from dualspeed.settings.stage import StageSettings

CONFIG_FILE = "config.yaml"
HEADERS = (
    "row",
    "stage",
    "GPUs",
    "samples",
    "tokens full",
    "fast",
    "EFLOPs",
    "speedup",
    "tower",
    "cap",
    "GB/GPU",
    "margin",
    *(f"{gpu.name} h" for gpu in GPUS.values()),
    *(f"{gpu.name} GPU h" for gpu in GPUS.values()),
    "disk GB",
    "while training",
)


@dataclass(frozen=True)
class Line:
    """Line of the table: one stage of one row, or of several rows that share a pretraining."""

    name: str
    """Id of the first row, with the number of further rows."""
    model: str
    """Key of the project's models."""
    settings: StageSettings
    """Settings of the stage."""
    cost: StageCost
    """Cost of the stage."""


def plan(config: Path, sheet: Path | None = None) -> str:
    """Table of a project's costs, with its assumptions.

    Args:
        config: folder of a configuration, or its file.
        sheet: sheet of experiments to use instead of the configuration's.

    Raises:
        PlanError: a stage needs more memory than its GPU has; the table is part of the message.
    """
    project = load_project(config / CONFIG_FILE if config.is_dir() else config, experiments=sheet)
    lines = lines_of(project)
    text = f"{table(project, lines)}\n\n{notes(project, lines)}"
    refused = [refusal(project, line) for line in lines if not line.cost.fits(GPUS[project.plan.gpu])]
    if refused:
        raise PlanError("\n".join(["some rows can't run:", text, "", *refused]))
    return text


def lines_of(project: Project) -> list[Line]:
    """Lines of all stages: each finetuning, and before the first one that needs it, its pretraining."""
    num_sharing = Counter(row.pretrain_key for row in project.rows)
    lines = []
    for row in project.rows:
        pretrain = project.pretrain_settings(row)
        if pretrain is not None and (num_rows := num_sharing.pop(row.pretrain_key, 0)) > 0:
            also = f" (+{num_rows - 1} rows)" if num_rows > 1 else ""
            lines.append(line_of(project, row, pretrain, also))
        lines.append(line_of(project, row, project.finetune_settings(row), ""))
    return lines


def line_of(project: Project, row: Row, settings: StageSettings, also: str) -> Line:
    """Line of one stage; a ConfigError names row and stage."""
    try:
        cost = stage_cost(project, settings, row.model)
    except ConfigError as error:
        raise ConfigError(f"row {row.id}: {settings.stage}: {error}") from None
    return Line(row.id + also, row.model, settings, cost)


def table(project: Project, lines: list[Line]) -> str:
    """Table with one line for each stage, and the sum."""
    cells = [cells_of(project, line) for line in lines]
    hours = [
        sum(line.cost.hours(gpu, project.plan.utilisation) * line.cost.processes.num_gpus for line in lines)
        for gpu in GPUS.values()
    ]
    disk = sum(line.cost.checkpoint_bytes for line in lines) / 1e9
    total = ["all", *[""] * (HEADERS.index("EFLOPs") - 1), sum(line.cost.flops for line in lines) / 1e18]
    total += [""] * (HEADERS.index(f"{next(iter(GPUS.values())).name} GPU h") - len(total)) + hours + [disk, ""]
    formats = [".1f" if name in ("EFLOPs",) or name.endswith(" h") else ".0f" for name in HEADERS]
    formats[HEADERS.index("speedup")] = ".2f"
    return tabulate([*cells, total], HEADERS, floatfmt=formats, intfmt=",", tablefmt="github")


def cells_of(project: Project, line: Line) -> list[str | float]:
    """Cells of one stage's line."""
    cost = line.cost
    hours = [cost.hours(gpu, project.plan.utilisation) for gpu in GPUS.values()]
    gpu, prunes = GPUS[project.plan.gpu], line.settings.dualspeed.slow_mode_ratio < 1
    return [
        line.name,
        line.settings.stage + (" LoRA" if line.settings.recipe.lora else ""),
        f"{cost.processes.num_gpus} {cost.processes.sharding}",
        cost.lengths.samples,
        round(cost.lengths.mean("full_tokens")),
        round(cost.lengths.mean("fast_tokens")) if prunes else "-",
        cost.flops / 1e18,
        cost.baseline_flops / cost.flops,
        f"{cost.tower_share:.0%}" if prunes else "-",
        f"{cost.cap:.2f}" if prunes else "-",
        f"{cost.memory / 1e9:.0f}" + ("" if cost.fits(gpu) else " !"),
        f"{1 - cost.memory / gpu.memory:.0%}",
        *hours,
        *(hour * cost.processes.num_gpus for hour in hours),
        cost.checkpoint_bytes / 1e9,
        cost.state_bytes / 1e9,
    ]


def notes(project: Project, lines: list[Line]) -> str:
    """Assumptions of the table."""
    assumed = sorted({line.settings.recipe.data_name for line in lines if not line.cost.lengths.is_counted})
    sizes = [file.size for source in project.downloads.values() for file in source.files]
    known = sum(size for size in sizes if size is not None) / 1e9
    return "\n".join(
        [
            f"Hours: FLOPs over {project.plan.utilisation:.0%} of the peak that the GPU's maker states "
            "(plan.utilisation); speedup: FLOPs of training on full tokens over these.",
            "Tower: share of vision tower and projector in the FLOPs of a fast step; cap: the speedup if fast mode "
            "dropped every visual token, which no pruning ratio exceeds.",
            f"Memory: of the longest samples; margin: share of an {GPUS[project.plan.gpu].name} (plan.gpu) that left; "
            f"rows have to fit it with {ERROR:.0%} more than they need, by which the arithmetic may be wrong.",
            "Disk: checkpoints that stay, and beside them, while a stage trains, what it resumes from.",
            *kept_features(lines),
            f"Downloads: {known:.0f} GB in files whose size is stated, and {sizes.count(None)} files or patterns of "
            "unknown size." if sizes else "Downloads: none.",
            f"Lengths are assumed (plan.datasets) until preparation counts them: {', '.join(assumed)}."
            if assumed
            else "Lengths are counted.",
        ]
    )  # fmt: skip


def kept_features(lines: list[Line]) -> list[str]:
    """Sentences that say what each folder of `cache_features` will hold."""
    found = {
        (line.settings.recipe.cache_features, line.model, line.settings.recipe.data_name): line.cost
        for line in lines
        if line.settings.recipe.cache_features is not None
    }
    return [
        f"Kept features (cache_features): up to {cost.kept_bytes / 1e9:.3g} GB in {folder} for {model} on {data}, "
        f"{cost.kept_bytes / cost.lengths.samples / 1e6:.2f} MB a sample; shared by all rows."
        for (folder, model, data), cost in found.items()
    ]


def refusal(project: Project, line: Line) -> str:
    """Reason why a stage can't run, and the changes with which it would."""
    cost, gpu = line.cost, GPUS[project.plan.gpu]
    return (
        f"{line.name}: {line.settings.stage}: needs {cost.memory / 1e9:.0f} GB on each of {cost.processes.num_gpus} "
        f"GPUs, "
        f"with a margin of {ERROR:.0%}, and an {gpu.name} has {gpu.memory / 1e9:.0f}; "
        f"{remedies(project, line.settings, line.model)}"
    )
