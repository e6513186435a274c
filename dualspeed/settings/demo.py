"""Settings of the demo's data and base model; no torch, so that a configuration can be checked at once."""

from dataclasses import dataclass, fields

from dualspeed.settings.reading import check_range


@dataclass(frozen=True, kw_only=True)
class SceneSettings:
    """Number of scenes and questions that `write_demo_data` draws."""

    seed: int = 0
    """Seed of all random numbers."""
    num_train_scenes: int = 8000
    """Images to train on; each has one caption in pretrain.json."""
    conversations_per_scene: int = 1
    """Records of finetune.json about the same image, each with other questions."""
    turns_per_conversation: int = 3
    """Questions in one record of finetune.json."""
    num_eval_scenes: int = 250
    """Images of each evaluation split: `test` (unseen digits) and `heldout` (training digits, unseen scenes)."""
    num_validation_scenes: int = 48
    """Images of the split `heldout` with a conversation each in validation.json; at most all of them."""
    questions_per_benchmark: int = 500
    """Questions of each benchmark in each evaluation split."""

    def __post_init__(self) -> None:
        check_positive(self)


@dataclass(frozen=True, kw_only=True)
class BaseModelSettings:
    """Sizes of the demo's base model, and how long its parts are trained."""

    seed: int = 0
    """Seed of initial weights and order of training."""
    vision_width: int = 64
    """Width of the vision tower."""
    vision_layers: int = 2
    """Layers of the vision tower; features are those of the last but one."""
    vision_steps: int = 300
    """Steps in which the tower learns to classify patches; then it is frozen."""
    vision_batch_size: int = 32
    """Images in a step of the tower's training."""
    text_width: int = 96
    """Width of the language model."""
    text_layers: int = 3
    """Layers of the language model."""
    text_heads: int = 4
    """Attention heads of the language model."""
    excerpt_patches: int = 14
    """Patches of an excerpt: all with digits, and random others."""
    caption_steps: int = 600
    """Steps on captions of excerpts."""
    question_steps: int = 600
    """Steps after those on captions, most of them on questions about excerpts."""
    language_batch_size: int = 32
    """Excerpts in a step on captions or questions."""
    num_scenes: int = 6000
    """Training images that the base model learns from."""
    vision_learning_rate: float = 1e-3
    """Peak learning rate of the tower (cosine schedule, 50 warmup steps)."""
    language_learning_rate: float = 2e-3
    """Peak learning rate of language model and projector, with the same schedule."""
    initializer_range: float = 0.08
    """Standard deviation of the language model's initial weights; 0.02, as in large models, is too small at this
    width."""

    def __post_init__(self) -> None:
        check_positive(self)


def check_positive(settings: SceneSettings | BaseModelSettings) -> None:
    """Raise ConfigError unless every setting is above 0; a seed may be 0."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.name == "seed":
            check_range(field.name, value, value >= 0, "0 or more")
        elif field.type is int:
            check_range(field.name, value, value >= 1, "1 or more")
        else:
            check_range(field.name, value, value > 0, "above 0")
