"""Changes that make a stage fit its GPUs: the smallest set of them."""

import dataclasses
from collections.abc import Callable, Iterator
from itertools import combinations

from dualspeed.errors import ConfigError
from dualspeed.plan.costs import StageCost, stage_cost
from dualspeed.settings.plan import GPUS
from dualspeed.settings.project import Project
from dualspeed.settings.recipe import LoraRecipe, Recipe
from dualspeed.settings.stage import StageSettings

Change = Callable[[Recipe], Recipe]
FSDP2 = "config/accelerate/fsdp2.yaml"


def remedies(project: Project, settings: StageSettings, model: str) -> str:
    """Text that names the first set of changes that fits; small sets and mild changes are tried first."""
    gpu = GPUS[project.plan.gpu]
    as_is = stage_cost(project, settings, model)
    changes = list(possible_changes(settings, as_is.processes.num_gpus))
    for count in range(1, len(changes) + 1):
        for chosen in combinations(changes, count):
            recipe = settings.recipe
            for _, change in chosen:
                recipe = change(recipe)
            cost = try_cost(project, dataclasses.replace(settings, recipe=recipe), model)
            if cost is not None and cost.fits(gpu):
                words = " and ".join(name for name, _ in chosen)
                return f"{words} would fit ({cost.memory / 1e9:.0f} GB)"
    larger = [key for key, other in GPUS.items() if as_is.fits(other)]
    if larger:
        return f"no change of the recipe that was tried would; plan.gpu: {' or '.join(larger)} would fit"
    return "none of the changes tried would fit: more GPUs, or larger ones"


def try_cost(project: Project, settings: StageSettings, model: str) -> StageCost | None:
    """Cost of a changed stage; None if the changed recipe is invalid."""
    try:
        return stage_cost(project, settings, model)
    except ConfigError:
        return None


def possible_changes(settings: StageSettings, num_gpus: int) -> Iterator[tuple[str, Change]]:
    """Name and function of each change of the recipe, the mildest first."""
    recipe = settings.recipe
    arguments = recipe.training_arguments
    if not (arguments.get("activation_checkpointing") or arguments.get("gradient_checkpointing")):
        checkpointing = arguments | {"activation_checkpointing": True}
        yield (
            "training_arguments.activation_checkpointing: true",
            lambda recipe: dataclasses.replace(recipe, training_arguments=checkpointing),
        )
    batch = recipe.per_device_batch_size or recipe.global_batch_size // num_gpus
    if budgets := recipe.token_budgets:
        fast, slow = (budget // 2 for budget in budgets.values())
        yield (
            f"tokens_per_batch: {fast} and slow_tokens_per_batch: {slow}",
            lambda recipe: dataclasses.replace(recipe, tokens_per_batch=fast, slow_tokens_per_batch=slow),
        )
    while batch % 2 == 0 and not budgets:
        batch //= 2
        yield f"per_device_batch_size: {batch}", with_batch(batch)
    if recipe.accelerate_config != FSDP2 and num_gpus > 1:
        yield f"accelerate_config: {FSDP2}", lambda recipe: dataclasses.replace(recipe, accelerate_config=FSDP2)
    if settings.stage == "finetune" and recipe.lora is None:
        yield "lora: {}", lambda recipe: dataclasses.replace(recipe, lora=LoraRecipe())


def with_batch(batch: int) -> Change:
    """Change to micro-batches of at most `batch` samples."""
    return lambda recipe: dataclasses.replace(
        recipe,
        per_device_batch_size=batch,
        slow_per_device_batch_size=recipe.slow_per_device_batch_size and min(recipe.slow_per_device_batch_size, batch),
    )
