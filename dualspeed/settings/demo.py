"""Settings of the demo's data and base model; no torch, so that a configuration can be checked at once."""

from dataclasses import dataclass, fields
from typing import Any, TypeVar

from dualspeed.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SceneSettings:
    """What `write_demo_data` draws and asks."""

    seed: int = 0
    """Everything drawn follows from it."""
    num_train_scenes: int = 8000
    """Pictures to train on; each has one caption in pretrain.json."""
    conversations_per_scene: int = 1
    """Records of finetune.json that share a picture, with other questions each."""
    turns_per_conversation: int = 3
    """Questions in one record of finetune.json."""
    num_eval_scenes: int = 250
    """Pictures of each evaluation split: `test` (unseen digits) and `heldout` (training digits, unseen scenes)."""
    num_validation_scenes: int = 48
    """Of the `heldout` ones, those with a conversation each in validation.json; at most as many as there are."""
    questions_per_benchmark: int = 500
    """Questions of each benchmark in each evaluation split."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < (field.name != "seed"):
                raise ConfigError(f"data.{field.name}: {value!r} is no valid number; valid: a whole number above 0")


@dataclass(frozen=True, kw_only=True)
class BaseModelSettings:
    """Sizes of the demo's base model and how long its parts are trained."""

    seed: int = 0
    """Initial weights and order of training."""
    vision_width: int = 64
    """Width of the vision tower."""
    vision_layers: int = 2
    """Layers of the vision tower; features are those of the last but one."""
    vision_steps: int = 300
    """Steps of `vision_batch_size` pictures that teach the tower to name patches; then it is frozen."""
    vision_batch_size: int = 32
    """Pictures in a step of the tower's training."""
    text_width: int = 96
    """Width of the language model."""
    text_layers: int = 3
    """Layers of the language model."""
    text_heads: int = 4
    """Attention heads of the language model."""
    excerpt_patches: int = 14
    """Patches of an excerpt: those that hold digits and a few others."""
    caption_steps: int = 600
    """Steps on captions of excerpts."""
    question_steps: int = 600
    """Steps that follow, most of them on questions about excerpts."""
    language_batch_size: int = 32
    """Excerpts in either."""
    num_scenes: int = 6000
    """Training pictures that the base model learns from."""
    vision_learning_rate: float = 1e-3
    """Peak learning rate of the tower (cosine, 50 steps of warm-up)."""
    language_learning_rate: float = 2e-3
    """The same for language model and projector."""
    initializer_range: float = 0.08
    """Standard deviation of their initial weights; 0.02 as in large models starts too flat at this width."""


Settings = TypeVar("Settings", SceneSettings, BaseModelSettings)


def settings_from_dict(cls: type[Settings], values: dict[str, Any]) -> Settings:
    """Build a settings dataclass, ignoring the key `source`; an unknown key is a ValueError that lists the valid."""
    valid = {field.name for field in fields(cls)}
    unknown = sorted(set(values) - valid - {"source"})
    if unknown:
        raise ConfigError(f"{cls.__name__}: unknown key {', '.join(unknown)}; valid: {', '.join(sorted(valid))}")
    return cls(**{key: value for key, value in values.items() if key in valid})
