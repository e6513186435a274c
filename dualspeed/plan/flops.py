"""FLOPs of training steps, as torch's counter counts them: two a multiply-add, attention over all pairs of tokens.

A forward pass costs one unit of a linear layer; its backward pass one for the gradient of its input, and one for the
gradient of its weights where they are trained. L tokens of a sequence, S of them supervised, N visual ones.
"""

import dataclasses
from dataclasses import dataclass

from dualspeed.plan.shapes import ModelShape


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Lengths of one training sample."""

    full_tokens: int
    fast_tokens: int
    supervised_tokens: int
    visual_tokens: int
    """0 for a text alone."""
    tiles: int
    """Squares that the vision tower encodes."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a stage trains, and how."""

    language: bool
    vision: bool = False
    lora_rank: int = 0
    """0: no adapters; else the language model itself is frozen."""
    lora_dropout: bool = False
    checkpointing: bool = False
    """Whether blocks of the language model run twice in steps on full tokens, and needn't keep their activations."""

    def in_mode(self, mode: str) -> "Trained":
        """As a step of this mode has it: fast ones keep what they compute."""
        return dataclasses.replace(self, checkpointing=self.checkpointing and mode != "fast")


def language_flops(shape: ModelShape, tokens: int, supervised: int, trained: Trained, backward: bool = True) -> float:
    """Language model and head on one sequence."""
    linear = 2 * tokens * shape.layer_parameters * shape.text_layers
    attention = 4 * tokens**2 * shape.text_width * shape.text_layers
    head = 2 * supervised * shape.vocabulary * shape.text_width
    adapters = 2 * tokens * shape.adapter_parameters(trained.lora_rank)
    blocks = linear + attention + adapters
    if not backward:
        return blocks + head
    trains_weights = trained.language and not trained.lora_rank
    linear_passes = 3 if trains_weights else 2
    # A block runs again up to its last product, whose result nothing asks for.
    last = 2 * tokens * shape.text_inner * shape.text_width * shape.text_layers
    recomputed = blocks - last if trained.checkpointing else 0
    return linear_passes * (linear + head) + 3 * (attention + adapters) + recomputed


def vision_flops(shape: ModelShape, tiles: int, trained: Trained) -> float:
    """The vision tower up to the layer that features come from, on a sample's squares."""
    positions = shape.side**2 + 1
    block = 4 * shape.vision_width**2 + 2 * shape.vision_width * shape.vision_inner
    blocks = (shape.vision_layers - 1) * (2 * positions * block + 4 * positions**2 * shape.vision_width)
    patches = 2 * shape.side**2 * shape.vision_width * 3 * shape.patch_size**2
    return tiles * (3 * blocks + 2 * patches if trained.vision else blocks + patches)


def projector_flops(shape: ModelShape, tiles: int, trained: Trained) -> float:
    """The projector, which is trained in both stages."""
    tokens = tiles * shape.side**2
    first, second = 2 * shape.vision_width * shape.text_width, 2 * shape.text_width**2
    return tokens * ((3 if trained.vision else 2) * first + 3 * second)


def step_flops(shape: ModelShape, sample: Sample, trained: Trained, mode: str, distill: bool = True) -> float:
    """One sample's share of a training step.

    Args:
        mode: `baseline`, `fast`, or `slow`, whose teacher runs in fast mode unless `distill` is False.
    """
    trained = trained.in_mode(mode)
    visual = vision_flops(shape, sample.tiles, trained) + projector_flops(shape, sample.tiles, trained)
    # Similarities of all pairs of visual tokens, which DivPrune and its like select by.
    pruner = 2 * sample.visual_tokens**2 * shape.text_width
    fast, full, supervised = sample.fast_tokens, sample.full_tokens, sample.supervised_tokens
    if mode == "fast":
        return visual + pruner + language_flops(shape, fast, supervised, trained)
    total = visual + language_flops(shape, full, supervised, trained)
    if mode == "slow" and distill and sample.visual_tokens:
        total += pruner + language_flops(shape, fast, supervised, trained, backward=False)
    return total


def trained_parameters(shape: ModelShape, trained: Trained) -> int:
    """Parameters that a stage trains."""
    parts = shape.parameters
    number = parts["projector"] + (parts["vision"] if trained.vision else 0)
    if trained.lora_rank:
        return number + shape.adapter_parameters(trained.lora_rank)
    return number + (parts["layers"] + parts["embeddings"] if trained.language else 0)
