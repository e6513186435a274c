"""What the workflow tells each job: the part of the configuration that matters to it, as JSON values.

Snakemake compares these with what a job ran with before, so anything here that a job does not depend on would make it
run again for nothing. Settings of training are in dualspeed.settings.project.
"""

import dataclasses
from typing import Any

from dualspeed.files import sha256_of_json
from dualspeed.settings.method import DualSpeedConfig
from dualspeed.settings.model import ModelParts
from dualspeed.settings.names import in_paper_order
from dualspeed.settings.project import Experiment, ProjectConfig
from dualspeed.settings.recipe import Recipe
from dualspeed.settings.sources import Source
from dualspeed.settings.stage import finetune_settings, pretrain_key, pretrain_settings

# Steps of each mode that a measurement of speed takes the median of.
SPEED_REPEATS = 15
# CPU threads of a measurement, as the training rules have: more serve long sequences better than short ones.
SPEED_THREADS = 1


def parent_run(project: ProjectConfig, experiment: Experiment) -> dict[str, str]:
    """Which tracked run a row's jobs belong to: the row and a hash of all that trains it."""
    stages = [pretrain_settings(project, experiment).to_dict(), finetune_settings(project, experiment).to_dict()]
    return {"row": experiment.id, "settings_hash": sha256_of_json(stages)[:12]}


def answer_settings(project: ProjectConfig, experiment: Experiment, inference: str) -> dict[str, Any]:
    """How a row's model answers: on full tokens, or with its own pruner and ratio, or the ones for models without."""
    settings = {
        "experiment": experiment.id,
        "inference": inference,
        "benchmarks": {name: {"folder": benchmark.folder} for name, benchmark in project.benchmarks.items()},
        "batch_size": project.inference.batch_size,
        "max_new_tokens": project.inference.max_new_tokens,
    }
    if inference == "pruned":
        chosen = project.inference if experiment.method == "baseline" else experiment.dualspeed
        settings |= {"pruner": chosen.pruner, "pruning_ratio": chosen.pruning_ratio}
    return settings


def speed_settings(project: ProjectConfig, experiment: Experiment) -> dict[str, Any]:
    """How a row's steps are timed.

    r is a matter of arithmetic on the times of a fast and a slow step, alpha only of whether a teacher runs.
    """
    recipe = project.models[experiment.model].stages.finetune
    ratio = DualSpeedConfig().slow_mode_ratio
    weight = 1.0 if experiment.dualspeed.distillation_weight else 0.0
    method = dataclasses.replace(experiment.dualspeed, slow_mode_ratio=ratio, distillation_weight=weight)
    return {
        "dualspeed": method.to_dict(),
        "chat_template": recipe.chat_template,
        "batch_size": recipe.per_device_batch_size or recipe.global_batch_size,
        "repeats": SPEED_REPEATS,
        "threads": SPEED_THREADS,
    }


def speed_key(project: ProjectConfig, experiment: Experiment) -> str | None:
    """Name of the measurement of a row's step times; rows with the same share it. None for a row that never prunes."""
    if experiment.method == "baseline":
        return None
    method = experiment.dualspeed
    teacher = "distilled" if method.distillation_weight else "plain"
    name = f"{experiment.model}-{method.pruner}-p{method.pruning_ratio:g}-l{method.num_virtual_tokens}-{teacher}"
    return f"{name}-{sha256_of_json(speed_settings(project, experiment))[:8]}"


def table_settings(project: ProjectConfig) -> dict[str, Any]:
    """What tables and figures show: the sheet's rows and where their results lie."""
    rows = [
        dataclasses.asdict(experiment)
        | {
            "inferences": list(experiment.inferences),
            "tables": list(experiment.tables),
            "pretrain_key": pretrain_key(project, experiment),
            "speed_key": speed_key(project, experiment),
            "settings_hash": parent_run(project, experiment)["settings_hash"],
        }
        for experiment in project.experiments
    ]
    return {
        "results": project.results,
        "sheet": project.sheet,
        "experiments": rows,
        "benchmarks": project.scored,
        "inference": {"pruner": project.inference.pruner, "pruning_ratio": project.inference.pruning_ratio},
    }


def kept_tokens_settings(project: ProjectConfig) -> dict[str, Any]:
    """Whose pictures show what each pruning method keeps, and at which ratio."""
    names = in_paper_order(project.benchmarks)
    benchmark = "gqa" if "gqa" in names else names[0]
    return {
        "benchmark": benchmark,
        "folder": project.benchmarks[benchmark].folder,
        "pruning_ratio": project.inference.pruning_ratio,
        "num_pictures": 2,
    }


def report_settings(project: ProjectConfig, command: str) -> dict[str, Any]:
    """What the report shows: what tables do, and examples; `command` makes all of it again."""
    folders = {name: benchmark.folder for name, benchmark in project.benchmarks.items()}
    return table_settings(project) | {"folders": folders, "command": command}


def demo_data_settings(project: ProjectConfig) -> dict[str, Any]:
    """What the demo's data is drawn by."""
    return dataclasses.asdict(project.data)


def base_model_settings(project: ProjectConfig) -> dict[str, Any]:
    """How the demo's base model is made."""
    return dataclasses.asdict(project.base_model)


def parts_settings(parts: ModelParts) -> dict[str, Any]:
    """What a base model is put together from."""
    return dataclasses.asdict(parts)


def preparation_settings(recipe: Recipe) -> dict[str, Any]:
    """How a stage's data is prepared."""
    return recipe.preparation().to_dict()


def download_settings(source: Source) -> dict[str, Any]:
    """What a source is downloaded by."""
    return dataclasses.asdict(source)
