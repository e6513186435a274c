"""Peak memory of a training process on one GPU, by what autograd keeps of each layer.

T tokens of a micro-batch, D and I width and inner width of the language model, K width of its keys, V vocabulary.
Arithmetic in bfloat16; what is trained is held in float32, with two moments of AdamW in float32.
"""

from dataclasses import dataclass

from dualspeed.plan.flops import Sample, Trained, trained_parameters
from dualspeed.plan.shapes import ModelShape

SHARDINGS = ("ddp", "zero2", "zero3", "fsdp2")
RESERVED = 1.5e9
"""CUDA's context, communication buffers and what the allocator loses to fragments: a rule of thumb, not measured."""


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Bytes at the fullest moment of a step: as its backward pass begins, or as it ends."""

    weights: float
    optimizer: float
    gradients: float
    activations: float
    """When the backward pass begins."""
    last_block: float
    """What is left of them when it ends, less the gradients that are still to come."""
    accumulates: bool
    """Whether gradients of an earlier micro-batch are there when it begins."""

    @property
    def total(self) -> float:
        """Of everything."""
        begins = self.activations + (self.gradients if self.accumulates else 0)
        return self.weights + self.optimizer + max(begins, self.gradients + self.last_block)


def layer_bytes(shape: ModelShape, trained: Trained, in_float32: bool = False) -> float:
    """What one block of the language model keeps of a token for the backward pass.

    Args:
        in_float32: whether the block's weights are float32 ones under autocast, as in DDP, so that the residual stream
            is float32 and each product has a copy of its input; else they are bfloat16 ones.
    """
    width, inner = shape.text_width, shape.text_inner
    attention = 4 * width + 4 * shape.key_width
    # The gate, its activation and what it multiplies; the last product's input too if its weights are trained.
    gated = 6 * inner
    if trained.lora_rank:
        # Of each adapter: its input and its dropout's mask (a byte); of two norms: their float32 input.
        adapters = (2 + trained.lora_dropout) * (6 * width + inner) + 2 * 7 * trained.lora_rank
        return 8 * width + attention + gated + adapters
    if not trained.language:
        return 8 * width + attention + gated
    if in_float32:
        return 16 * width + attention + 10 * width + gated + 2 * inner
    return 16 * width + attention + gated + 2 * inner


def activation_bytes(
    shape: ModelShape, sample: Sample, trained: Trained, mode: str, batch: int, in_float32: bool = False
) -> tuple[float, float]:
    """What a micro-batch of `batch` samples holds when the backward pass begins, and when it ends."""
    trained = trained.in_mode(mode)
    tokens = batch * (sample.fast_tokens if mode == "fast" else sample.full_tokens)
    width, stream = shape.text_width, 4 if in_float32 else 2
    block = tokens * layer_bytes(shape, trained, in_float32)
    kept = shape.text_layers * (tokens * stream * width if trained.checkpointing else block)
    # Gradients on their way through a block: of both factors of the gated product, whose own takes the place of what
    # it frees, and of the stream.
    passing = tokens * (4 * shape.text_inner + 2 * stream * width)
    visual = batch * sample.tiles * shape.side**2 * (2 * shape.vision_width + 6 * width)
    ends = tokens * (2 * stream * width + 4 * width)
    logits = batch * sample.supervised_tokens * shape.vocabulary * 14
    begins = kept + visual + max(ends + logits, passing + (block if trained.checkpointing else 0))
    return begins, block + passing + visual


def peak_memory(
    shape: ModelShape,
    sample: Sample,
    trained: Trained,
    batches: dict[str, int],
    sharding: str,
    num_gpus: int,
    accumulates: bool,
) -> Peak:
    """Peak of the fullest of the modes that a run's steps have.

    Args:
        batches: mode -> samples of a micro-batch.
        sharding: one of SHARDINGS.
        accumulates: whether a step has several micro-batches.
    """
    parts = shape.parameters
    num_trained = trained_parameters(shape, trained)
    added = shape.adapter_parameters(trained.lora_rank)
    num_frozen = sum(parts.values()) + added - num_trained
    of_block = parts["layers"] / shape.text_layers
    outside = sum(parts.values()) - parts["layers"]
    shared = 1 / num_gpus
    weights, optimizer, gradients = {
        "ddp": (2 * num_frozen + 4 * num_trained, 8 * num_trained, 4 * num_trained),
        # bfloat16 weights for arithmetic; the optimizer has float32 ones and two moments.
        "zero2": (2 * (num_frozen + num_trained), 12 * num_trained * shared, 2 * num_trained * shared),
        "zero3": (2 * (num_frozen + num_trained) * shared, 12 * num_trained * shared, 2 * num_trained * shared),
        "fsdp2": ((2 * num_frozen + 4 * num_trained) * shared, 8 * num_trained * shared, 4 * num_trained * shared),
    }[sharding]
    if sharding in ("zero3", "fsdp2"):
        # Gathered: two blocks, and what isn't in blocks.
        weights += 2 * (2 * of_block + outside)
        gradients += 2 * of_block if trained.language else 0
    in_float32 = sharding == "ddp" and trained.language and not trained.lora_rank
    if in_float32:
        # Autocast's copies: all at once, or block by block.
        weights += 2 * (of_block + parts["embeddings"] / 2 if trained.checkpointing else num_trained)
    trains_blocks = trained.language and not trained.lora_rank
    gradients_to_come = gradients * (of_block + parts["embeddings"] / 2) / num_trained if trains_blocks else 0
    fullest = [activation_bytes(shape, sample, trained, mode, batch, in_float32) for mode, batch in batches.items()]
    return Peak(
        weights=weights,
        optimizer=optimizer,
        gradients=gradients,
        activations=max(begins for begins, _ in fullest),
        last_block=max(ends for _, ends in fullest) - gradients_to_come,
        accumulates=accumulates,
    )
