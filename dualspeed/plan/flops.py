"""FLOPs of training steps, as torch's counter counts them: 2 for a multiply-add, attention over all pairs of tokens.

The backward pass of a linear layer costs as much as its forward pass for the gradient of its input, and as much again
for the gradient of its weights if they are trained.
"""

import dataclasses
from dataclasses import dataclass

from dualspeed.plan.shapes import ModelShape
from dualspeed.plan.towers import Encoded


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Lengths of one training sample."""

    full_tokens: int
    """Tokens on full tokens."""
    fast_tokens: int
    """Tokens in fast mode, isolators included."""
    supervised_tokens: int
    """Tokens with a label."""
    visual_tokens: int
    """Visual tokens before pruning; 0 without an image."""
    encoded: Encoded
    """Cost of encoding its image."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Trained parts of the model beside the projector, which every stage trains."""

    language: bool
    """True if the language model is trained, or its adapters."""
    vision: bool = False
    """True if the vision tower is trained."""
    lora_rank: int = 0
    """Rank of the adapters, with which the language model itself is frozen; 0: no adapters."""
    lora_dropout: bool = False
    """True if the adapters have dropout."""
    checkpointing: bool = False
    """True for activation checkpointing: in steps on full tokens each block of the language model runs twice."""

    def in_mode(self, mode: str) -> "Trained":
        """Settings of a step in this mode: fast steps have no activation checkpointing."""
        return dataclasses.replace(self, checkpointing=self.checkpointing and mode != "fast")


def language_flops(shape: ModelShape, tokens: int, supervised: int, trained: Trained, backward: bool = True) -> float:
    """FLOPs of the language model and its head on one sequence."""
    linear = 2 * tokens * shape.layer_parameters * shape.text_layers
    attention = 4 * tokens**2 * shape.query_width * shape.text_layers
    head = 2 * supervised * shape.vocabulary * shape.text_width
    adapters = 2 * tokens * shape.adapter_parameters(trained.lora_rank)
    blocks = linear + attention + adapters
    if not backward:
        return blocks + head
    trains_weights = trained.language and not trained.lora_rank
    linear_passes = 3 if trains_weights else 2
    # Recomputing a block leaves out its last product, whose result the backward pass doesn't need.
    last = 2 * tokens * shape.text_inner * shape.text_width * shape.text_layers
    recomputed = blocks - last if trained.checkpointing else 0
    return linear_passes * (linear + head) + 3 * (attention + adapters) + recomputed


def visual_flops(sample: Sample, trained: Trained) -> float:
    """FLOPs of vision tower and projector, which every stage trains, for one sample; pruning doesn't lower them."""
    encoded = sample.encoded
    tower = 3 * encoded.blocks + 2 * encoded.patches if trained.vision else encoded.blocks + encoded.patches
    return tower + (3 if trained.vision else 2) * encoded.entry + 3 * encoded.projector


def step_flops(shape: ModelShape, sample: Sample, trained: Trained, mode: str, distill: bool = True) -> float:
    """FLOPs of a training step for one sample.

    Args:
        mode: `baseline` (full tokens), `fast` or `slow` (full tokens with distillation).
        distill: False leaves out the teacher of a slow step, a forward pass in fast mode.
    """
    trained = trained.in_mode(mode)
    visual = visual_flops(sample, trained)
    # Similarities of all pairs of visual tokens, which DivPrune and similar pruners compute.
    pruner = 2 * sample.visual_tokens**2 * shape.text_width
    fast, full, supervised = sample.fast_tokens, sample.full_tokens, sample.supervised_tokens
    if mode == "fast":
        return visual + pruner + language_flops(shape, fast, supervised, trained)
    total = visual + language_flops(shape, full, supervised, trained)
    if mode == "slow" and distill and sample.visual_tokens:
        total += pruner + language_flops(shape, fast, supervised, trained, backward=False)
    return total


def trained_parameters(shape: ModelShape, trained: Trained) -> int:
    """Number of parameters that a stage trains."""
    parts = shape.parameters
    number = parts["projector"] + (parts["vision"] if trained.vision else 0)
    if trained.lora_rank:
        return number + shape.adapter_parameters(trained.lora_rank)
    return number + (parts["layers"] + parts["embeddings"] if trained.language else 0)
