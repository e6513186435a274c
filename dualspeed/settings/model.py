"""A base model and how it is trained, as a configuration says it; no torch, so that it can be checked at once."""

from dataclasses import dataclass, field

from dualspeed.errors import ConfigError
from dualspeed.settings.reading import check_choice
from dualspeed.settings.recipe import Recipe, batch_plan
from dualspeed.settings.resources import JobResources, ModelResources

PRUNE_BUDGETS = ("image", "tile")
STAGES = ("pretrain", "finetune")
FAMILIES = ("llava", "llava_next")
DTYPES = ("bfloat16", "float16", "float32")
LLAVA_NEXT_GRIDS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
"""Height and width of LLaVA-NeXT's any-resolution pictures, for a tower of 336 pixels."""


@dataclass(frozen=True, kw_only=True)
class ModelParts:
    """A LLaVA as LLaVA's own training starts it: a language model, a vision tower, and what joins them."""

    family: str
    """llava or llava_next."""
    language_model: str
    """Folder of a Llama, Vicuna say, with its tokenizer."""
    vision_tower: str
    """Folder of a CLIP model with its image processor."""
    projector: str | None = None
    """A projector as LLaVA publishes it, mm_projector.bin; null: random weights."""
    image_grid_pinpoints: tuple[tuple[int, ...], ...] | None = None
    """Heights and widths that LLaVA-NeXT fits pictures into; null: its own five."""
    dtype: str = "bfloat16"
    """Of the weights."""

    def __post_init__(self) -> None:
        check_choice("family", self.family, FAMILIES)
        check_choice("dtype", self.dtype, DTYPES)
        grids = self.image_grid_pinpoints
        if grids is not None and self.family != "llava_next":
            raise ConfigError(f"image_grid_pinpoints: {grids!r} for family {self.family}; valid: null")
        if grids is not None and not (grids and all(len(grid) == 2 and min(grid) > 0 for grid in grids)):
            raise ConfigError(f"image_grid_pinpoints: {grids!r}; valid: pairs of height and width in pixels")

    @property
    def inputs(self) -> tuple[str, ...]:
        """Folders and files that it is made from."""
        return tuple(path for path in (self.language_model, self.vision_tower, self.projector) if path is not None)


@dataclass(frozen=True, kw_only=True)
class Stages:
    """The two stages of training."""

    pretrain: Recipe
    """Projector and isolator."""
    finetune: Recipe
    """Language model, projector and isolator."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A base model and how it is trained."""

    source: str
    """`demo` or `parts` (made by the workflow), or the folder of a checkpoint."""
    stages: Stages
    """Recipe of each stage."""
    parts: ModelParts | None = None
    """What a model of source `parts` is put together from."""
    prune_budget: str = "image"
    """See DualSpeedConfig."""
    relevance_clip: str | None = None
    """See DualSpeedConfig; for rows with cdpruner."""
    resources: ModelResources = field(default_factory=ModelResources)
    """What its jobs ask a scheduler for."""

    def __post_init__(self) -> None:
        check_choice("prune_budget", self.prune_budget, PRUNE_BUDGETS)
        for stage in STAGES:
            recipe, wanted = getattr(self.stages, stage), self.resources_of(stage)
            try:
                batch_plan(recipe.global_batch_size, wanted.num_processes, recipe.per_device_batch_size or 1)
            except ConfigError as error:
                raise ConfigError(f"stages.{stage}.{error} (resources.{stage})") from None
        if (self.source == "parts") != (self.parts is not None):
            raise ConfigError(f"parts: with source {self.source!r}; valid: with source 'parts', and only there")

    def resources_of(self, job: str) -> JobResources:
        """What a job of this kind (a field of ModelResources) asks for, with the recipe's defaults."""
        stage = "pretrain" if job == "pretrain" else "finetune"
        use_cpu = bool(getattr(self.stages, stage).training_arguments.get("use_cpu"))
        return getattr(self.resources, job).resolved(use_cpu)

    @property
    def inputs(self) -> dict[str, str]:
        """Key -> file or folder that has to be there, or to be downloaded."""
        files = {f"stages.{stage}.accelerate_config": getattr(self.stages, stage).accelerate_config for stage in STAGES}
        if self.parts is not None:
            files |= {
                f"parts.{key}": getattr(self.parts, key) for key in ("language_model", "vision_tower", "projector")
            }
        elif self.source != "demo":
            files["source"] = self.source
        files["relevance_clip"] = self.relevance_clip
        return {key: path for key, path in files.items() if path is not None}
