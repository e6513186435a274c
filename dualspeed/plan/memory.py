"""Peak memory of a training process on one GPU, from the tensors that autograd saves in each layer.

Arithmetic is in bfloat16; trained parameters are float32, with two float32 moments of AdamW.
"""

from dataclasses import dataclass

from dualspeed.plan.flops import Sample, Trained, trained_parameters
from dualspeed.plan.shapes import ModelShape

RESERVED = 1.5e9
"""Bytes of CUDA's context, communication buffers and fragmentation: a rule of thumb, not measured."""

ERROR = 0.1
"""Largest error of the arithmetic: tests hold it to this share of what they measure on small models."""


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Peak bytes of a step, which are reached when its backward pass begins or when it ends."""

    weights: float
    """Weights that a process holds all the time: its shard of them, or all."""
    copies: float
    """Weights that are there while they are used: gathered from other processes, or cast for arithmetic."""
    optimizer: float
    """Moments of AdamW, and its own weights with ZeRO."""
    gradients: float
    """Gradients of all trained parameters."""
    activations: float
    """Activations when the backward pass begins."""
    last_block: float
    """Activations when the backward pass ends, less the gradients that are not computed yet."""
    accumulates: bool
    """True if gradients of an earlier micro-batch exist when the backward pass begins."""

    @property
    def total(self) -> float:
        """Peak bytes over all parts."""
        begins = self.activations + (self.gradients if self.accumulates else 0)
        return self.weights + self.copies + self.optimizer + max(begins, self.gradients + self.last_block)


def layer_bytes(shape: ModelShape, trained: Trained, in_float32: bool = False, is_sharded: bool = False) -> float:
    """Bytes that one block of the language model saves for the backward pass, for each token.

    Args:
        in_float32: True for float32 weights under autocast, as in DDP: the residual stream is float32, and each
            product has a bfloat16 copy of its input. False for bfloat16 weights.
        is_sharded: True if adapters are bfloat16 too, as FSDP2 and ZeRO gather them: without dropout they then read
            the very inputs of their layers. Under autocast each has a copy.
    """
    width, inner = shape.text_width, shape.text_inner
    attention = 4 * shape.query_width + 4 * shape.key_width
    if shape.has_head_norms:
        # Each head's norm saves its float32 input, and what its weights multiply if they are trained.
        is_trained = trained.language and not trained.lora_rank
        attention += (6 if is_trained else 4) * (shape.query_width + shape.key_width)
    # The gate, its activation and the factor that it multiplies. If the last product's weights are trained, its input
    # is saved too (2 * inner below).
    gated = 6 * inner
    if trained.lora_rank:
        # Each adapter saves its input and its dropout's mask (1 byte); each of the two norms its float32 input.
        inputs = (2 + trained.lora_dropout) * (5 * width + shape.query_width + inner)
        if is_sharded and not trained.lora_dropout:
            inputs = 4 * width + 2 * inner  # once for q, k and v, once for gate and up; o's is the attention's output
        return 8 * width + attention + gated + inputs + 2 * 7 * trained.lora_rank
    if not trained.language:
        return 8 * width + attention + gated
    if in_float32:
        return 16 * width + attention + 10 * width + gated + 2 * inner
    return 16 * width + attention + gated + 2 * inner


def logit_bytes(mode: str) -> int:
    """Bytes for each logit of a supervised token while the losses are computed (dualspeed.method.losses).

    Each number takes 2 bytes, in bfloat16. There are the logit itself and, for each loss, its gradient and the scaled
    copy of that gradient: 6 bytes with one loss. A slow step has two losses, and the teacher's logit.
    """
    return 12 if mode == "slow" else 6


def activation_bytes(
    shape: ModelShape,
    sample: Sample,
    trained: Trained,
    mode: str,
    batch: int,
    in_float32: bool = False,
    is_sharded: bool = False,
) -> tuple[float, float]:
    """Bytes of activations of a micro-batch when the backward pass begins, and when it ends.

    Args:
        batch: samples of the micro-batch.
        in_float32, is_sharded: as for `layer_bytes`.
    """
    trained = trained.in_mode(mode)
    tokens = batch * (sample.fast_tokens if mode == "fast" else sample.full_tokens)
    width, stream = shape.text_width, 4 if in_float32 else 2
    block = tokens * layer_bytes(shape, trained, in_float32, is_sharded)
    kept = shape.text_layers * (tokens * stream * width if trained.checkpointing else block)
    # Gradients inside a block: of both factors of the gated product and of the residual stream. The gradient of the
    # product itself takes the memory that the product frees.
    passing = tokens * (4 * shape.text_inner + 2 * stream * width)
    visual = batch * sample.encoded.saved_bytes
    ends = tokens * (2 * stream * width + 4 * width)
    logits = batch * sample.supervised_tokens * shape.vocabulary * logit_bytes(mode)
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
    """Peak over the modes of a run's steps.

    Args:
        batches: mode -> samples of a micro-batch.
        sharding: one of dualspeed.settings.sharding.SHARDINGS.
        accumulates: True if a step has several micro-batches.
    """
    parts = shape.parameters
    num_trained = trained_parameters(shape, trained)
    added = shape.adapter_parameters(trained.lora_rank)
    num_frozen = sum(parts.values()) + added - num_trained
    block_parameters, head_parameters = parts["layers"] / shape.text_layers, shape.vocabulary * shape.text_width
    outside = sum(parts.values()) - parts["layers"]
    shared = 1 / num_gpus
    weights, optimizer, gradients = {
        "ddp": (2 * num_frozen + 4 * num_trained, 8 * num_trained, 4 * num_trained),
        # Weights are bfloat16; the optimizer has float32 weights and two moments.
        "zero2": (2 * (num_frozen + num_trained), 12 * num_trained * shared, 2 * num_trained * shared),
        "zero3": (2 * (num_frozen + num_trained) * shared, 12 * num_trained * shared, 2 * num_trained * shared),
        "fsdp2": ((2 * num_frozen + 4 * num_trained) * shared, 8 * num_trained * shared, 4 * num_trained * shared),
    }[sharding]
    copies = 0.0
    if sharding in ("zero3", "fsdp2"):
        # Gathered weights: two blocks, and all parameters outside blocks.
        copies = 2 * (2 * block_parameters + outside)
        gradients += 2 * block_parameters if trained.language else 0
    in_float32 = sharding == "ddp" and trained.language and not trained.lora_rank
    if in_float32:
        # Autocast's bfloat16 copies: of all weights at once, or with checkpointing of one block at a time.
        copies = 2 * (block_parameters + head_parameters if trained.checkpointing else num_trained)
    trains_blocks = trained.language and not trained.lora_rank
    # Those of the first block and of the embeddings, unless the head, which has them, is the same weights.
    to_come = block_parameters + (0 if shape.ties_embeddings else head_parameters)
    gradients_to_come = gradients * to_come / num_trained if trains_blocks else 0
    fullest = [
        activation_bytes(shape, sample, trained, mode, batch, in_float32, is_sharded=sharding != "ddp")
        for mode, batch in batches.items()
    ]
    return Peak(
        weights=weights,
        copies=copies,
        optimizer=optimizer,
        gradients=gradients,
        activations=max(begins for begins, _ in fullest),
        last_block=max(ends for _, ends in fullest) - gradients_to_come,
        accumulates=accumulates,
    )
