"""`dualspeed plan`: a sheet's costs as one table, and an error for each stage that can't fit."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from dualspeed.errors import ConfigError, PlanError
from dualspeed.plan.costs import StageCost, stage_cost
from dualspeed.plan.remedies import remedies
from dualspeed.settings.plan import GPUS
from dualspeed.settings.project import Experiment, ProjectConfig, load_project
from dualspeed.settings.stage import StageSettings, finetune_settings, pretrain_key, pretrain_settings

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
    "GB/GPU",
    *(f"{gpu.name} h" for gpu in GPUS.values()),
    *(f"{gpu.name} GPU h" for gpu in GPUS.values()),
    "disk GB",
    "while training",
)


@dataclass(frozen=True)
class Line:
    """One stage of one row, or of several rows that share it."""

    name: str
    model: str
    settings: StageSettings
    cost: StageCost


def plan(config: Path, sheet: Path | None = None) -> str:
    """The table of a project and what it assumes.

    Args:
        config: folder of a configuration, or its file.
        sheet: another sheet of experiments than the configuration's.

    Raises:
        PlanError: a stage needs more memory than its GPU has; the table is part of the message.
    """
    project = load_project(config / CONFIG_FILE if config.is_dir() else config, experiments=sheet)
    lines = lines_of(project)
    text = f"{table(project, lines)}\n\n{notes(project, lines)}"
    refused = [refusal(project, line) for line in lines if line.cost.memory > GPUS[project.plan.gpu].memory]
    if refused:
        raise PlanError("\n".join(["some rows can't run:", text, "", *refused]))
    return text


def lines_of(project: ProjectConfig) -> list[Line]:
    """Each finetuning, after the pretraining that it is the first to need."""
    sharing: dict[str, list[Experiment]] = defaultdict(list)
    for experiment in project.experiments:
        sharing[pretrain_key(project, experiment)].append(experiment)
    lines = []
    for experiment in project.experiments:
        rows = sharing.pop(pretrain_key(project, experiment), None)
        if rows is not None:
            also = f" (+{len(rows) - 1} rows)" if len(rows) > 1 else ""
            lines.append(line_of(project, experiment, pretrain_settings(project, experiment), also))
        lines.append(line_of(project, experiment, finetune_settings(project, experiment), ""))
    return lines


def line_of(project: ProjectConfig, experiment: Experiment, settings: StageSettings, also: str) -> Line:
    """The line of one stage; ConfigError names row and stage."""
    try:
        cost = stage_cost(project, settings, experiment.model)
    except ConfigError as error:
        raise ConfigError(f"row {experiment.id}: {settings.stage}: {error}") from None
    return Line(experiment.id + also, experiment.model, settings, cost)


def table(project: ProjectConfig, lines: list[Line]) -> str:
    """One line a stage, and the sum."""
    cells = [cells_of(project, line) for line in lines]
    hours = [
        sum(line.cost.hours(gpu, project.plan.utilisation) * line.cost.processes.num_gpus for line in lines)
        for gpu in GPUS.values()
    ]
    disk = sum(line.cost.checkpoint_bytes for line in lines) / 1e9
    total = ["all", *[""] * (HEADERS.index("EFLOPs") - 1), sum(line.cost.flops for line in lines) / 1e18]
    total += [""] * (HEADERS.index("A100-80G GPU h") - len(total)) + hours + [disk, ""]
    formats = [".1f" if name in ("EFLOPs",) or name.endswith(" h") else ".0f" for name in HEADERS]
    formats[HEADERS.index("speedup")] = ".2f"
    return tabulate([*cells, total], HEADERS, floatfmt=formats, intfmt=",", tablefmt="github")


def cells_of(project: ProjectConfig, line: Line) -> list[str | float]:
    """The cells of one stage."""
    cost = line.cost
    hours = [cost.hours(gpu, project.plan.utilisation) for gpu in GPUS.values()]
    fits = cost.memory <= GPUS[project.plan.gpu].memory
    return [
        line.name,
        line.settings.stage + (" LoRA" if line.settings.recipe.lora else ""),
        f"{cost.processes.num_gpus} {cost.processes.sharding}",
        cost.lengths.samples,
        round(cost.lengths.mean("full_tokens")),
        round(cost.lengths.mean("fast_tokens")) if line.settings.dualspeed.slow_mode_ratio < 1 else "-",
        cost.flops / 1e18,
        cost.baseline_flops / cost.flops,
        f"{cost.memory / 1e9:.0f}" + ("" if fits else " !"),
        *hours,
        *(hour * cost.processes.num_gpus for hour in hours),
        cost.checkpoint_bytes / 1e9,
        cost.state_bytes / 1e9,
    ]


def notes(project: ProjectConfig, lines: list[Line]) -> str:
    """What the table assumes."""
    assumed = sorted({line.settings.recipe.annotations for line in lines if not line.cost.lengths.is_counted})
    sizes = [file.size for source in project.downloads.values() for file in source.files]
    known = sum(size for size in sizes if size is not None) / 1e9
    return "\n".join(
        [
            f"Hours: FLOPs over {project.plan.utilisation:.0%} of the peak that the GPU's maker states "
            "(plan.utilisation); speedup: FLOPs of training on full tokens over these.",
            f"Memory: of the longest samples; rows have to fit an {GPUS[project.plan.gpu].name} (plan.gpu).",
            "Disk: checkpoints that stay, and beside them, while a stage trains, what it resumes from.",
            f"Downloads: {known:.0f} GB in files whose size is stated, and {sizes.count(None)} files or patterns of "
            "unknown size." if sizes else "Downloads: none.",
            f"Lengths are assumed (plan.datasets) until preparation counts them: {', '.join(assumed)}."
            if assumed
            else "Lengths are counted.",
        ]
    )  # fmt: skip


def refusal(project: ProjectConfig, line: Line) -> str:
    """Why a stage can't run, and what would."""
    cost, gpu = line.cost, GPUS[project.plan.gpu]
    return (
        f"{line.name}: {line.settings.stage}: needs {cost.memory / 1e9:.0f} GB on each of {cost.processes.num_gpus} "
        f"GPUs, and an {gpu.name} has {gpu.memory / 1e9:.0f}; {remedies(project, line.settings, line.model)}"
    )
