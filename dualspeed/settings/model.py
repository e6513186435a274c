"""A base model and how it is trained, as a configuration says it; no torch, so that it can be checked at once."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dualspeed.chat_templates import AUTO, TEMPLATE_NAMES
from dualspeed.errors import ConfigError
from dualspeed.settings.families import BASE_FAMILIES
from dualspeed.settings.fields import check_fields, choice, number
from dualspeed.settings.recipe import Recipe, batch_plan
from dualspeed.settings.resources import JobResources, ModelResources

PRUNE_BUDGETS = ("image", "tile")
STAGES = ("pretrain", "finetune")
MADE_HERE = ("demo", "parts")
"""Values of `source` for models that the workflow makes."""
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True)
class ModelParts:
    """A LLaVA as LLaVA's own training starts it: a language model, a vision tower, and what joins them."""

    family: str = choice(tuple(BASE_FAMILIES))
    """llava or llava_next."""
    language_model: str
    """Folder of a Llama, Vicuna say, with its tokenizer."""
    vision_tower: str
    """Folder of a CLIP model with its image processor."""
    projector: str | None = None
    """A projector as LLaVA publishes it, mm_projector.bin; null: random weights."""
    image_grid_pinpoints: tuple[tuple[int, ...], ...] | None = None
    """Heights and widths that LLaVA-NeXT fits pictures into; null: its own five."""
    dtype: str = choice(DTYPES, default="bfloat16")
    """Dtype of the weights."""

    def __post_init__(self) -> None:
        check_fields(self)
        grids = self.image_grid_pinpoints
        if grids is not None and BASE_FAMILIES[self.family].grids is None:
            raise ConfigError(f"image_grid_pinpoints: {grids!r} for family {self.family}; valid: null")
        if grids is not None and not (grids and all(len(grid) == 2 and min(grid) > 0 for grid in grids)):
            raise ConfigError(f"image_grid_pinpoints: {grids!r}; valid: pairs of height and width in pixels")

    @property
    def inputs(self) -> tuple[str, ...]:
        """Folders and files that it is made from."""
        return tuple(path for path in (self.language_model, self.vision_tower, self.projector) if path is not None)


@dataclass(frozen=True, kw_only=True)
class Stages:
    """The stages of training."""

    pretrain: Recipe | None = None
    """Projector and isolator; null: rows finetune the base model as it is, which a finished VLM is good for."""
    finetune: Recipe
    """Language model, projector and isolator."""

    def __post_init__(self) -> None:
        if self.pretrain is not None and self.pretrain.lora is not None:
            raise ConfigError("pretrain.lora: the language model isn't trained there; valid: in stages.finetune")

    @property
    def recipes(self) -> dict[str, Recipe]:
        """Stage -> recipe of each stage that there is, in the order of training."""
        return {stage: recipe for stage in STAGES if (recipe := getattr(self, stage)) is not None}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A base model and how it is trained."""

    source: str
    """`demo` or `parts` (made by the workflow), or the folder of a checkpoint."""
    stages: Stages
    """Recipe of each stage."""
    parts: ModelParts | None = None
    """Parts of a model of source `parts`."""
    prune_budget: str = choice(PRUNE_BUDGETS, default="image")
    """See DualSpeedConfig."""
    relevance_clip: str | None = None
    """See DualSpeedConfig; for rows with a pruner that reads the user's text."""
    pixel_pruning: float | None = number(minimum=0, default=None)
    """See DualSpeedConfig; for rows that prune."""
    chat_template: str | None = choice((AUTO, *TEMPLATE_NAMES), default=None)
    """Prompt format of the stages that name none; null: `auto` for the folder of a checkpoint, vicuna_v1 for others."""
    resources: ModelResources = field(default_factory=ModelResources)
    """Resources that its jobs ask a scheduler for."""

    def __post_init__(self) -> None:
        check_fields(self)
        for stage, recipe in self.stages.recipes.items():
            wanted = self.resources_of(stage)
            try:
                batch_plan(recipe.global_batch_size, wanted.num_processes, recipe.per_device_batch_size or 1)
            except ConfigError as error:
                raise ConfigError(f"stages.{stage}.{error} (resources.{stage})") from None
        templates = [recipe.chat_template for recipe in self.stages.recipes.values()]
        if templates[-1] == AUTO != templates[0]:
            raise ConfigError(
                f"stages.finetune.chat_template: 'auto' behind a pretraining in {templates[0]!r}, which its "
                "checkpoint has as its own; valid: 'auto' in both, or a name"
            )
        if (self.source == "parts") != (self.parts is not None):
            raise ConfigError(f"parts: with source {self.source!r}; valid: with source 'parts', and only there")
        self.check_without_pretraining()
        if self.pixel_pruning is not None and self.source in MADE_HERE:
            raise ConfigError(
                f"pixel_pruning: {self.pixel_pruning:g} with source {self.source!r}, a LLaVA, whose tower takes whole "
                "images; valid: null, or the folder of a Qwen-VL as source"
            )

    def check_without_pretraining(self) -> None:
        """Raise ConfigError if there is no pretraining, but something needs one or is for one."""
        if self.stages.pretrain is not None:
            return
        if self.parts is not None and self.parts.projector is None:
            raise ConfigError(
                "stages.pretrain: missing, and the projector of `parts` has random weights; valid: a recipe, or a "
                "projector in parts.projector"
            )
        if self.resources.pretrain != JobResources():
            raise ConfigError("resources.pretrain: given without stages.pretrain; valid: both or neither")

    def resources_of(self, job: str) -> JobResources:
        """Resources of a job of this kind (a field of ModelResources), with the recipe's defaults."""
        recipe = self.stages.recipes.get(job, self.stages.finetune)
        use_cpu = bool(recipe.training_arguments.get("use_cpu"))
        return getattr(self.resources, job).resolved(use_cpu)

    @property
    def inputs(self) -> dict[str, str]:
        """Key -> file or folder that has to be there, or to be downloaded."""
        recipes = self.stages.recipes.items()
        files = {f"stages.{stage}.accelerate_config": recipe.accelerate_config for stage, recipe in recipes}
        if self.parts is not None:
            files |= {
                f"parts.{key}": getattr(self.parts, key) for key in ("language_model", "vision_tower", "projector")
            }
        elif self.source != "demo":
            files["source"] = self.source
        files["relevance_clip"] = self.relevance_clip
        return {key: path for key, path in files.items() if path is not None}


def with_templates(models: Any) -> Any:
    """Models as a file describes them, with a `chat_template` in stages that name none, unless it is the default."""
    if not isinstance(models, Mapping):
        return models
    return {name: _with_template(model) if isinstance(model, Mapping) else model for name, model in models.items()}


def _with_template(model: Mapping[str, Any]) -> Mapping[str, Any]:
    template = model.get("chat_template") or (None if model.get("source") in MADE_HERE else AUTO)
    stages = model.get("stages")
    if template not in (AUTO, *TEMPLATE_NAMES) or not isinstance(stages, Mapping):
        return model  # reading it says what is wrong
    filled = {
        stage: {"chat_template": template, **recipe} if isinstance(recipe, Mapping) else recipe
        for stage, recipe in stages.items()
    }
    return {**model, "stages": filled}
