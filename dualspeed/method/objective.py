"""Objective of a step: how the first term of a batch's loss is made of its logits."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from dualspeed.method.logits import at_supervised, every_logit, supervised_logits
from dualspeed.method.losses import cross_entropy, supervised_labels
from dualspeed.method.outputs import DualSpeedOutput
from dualspeed.method.packing import packed_logits
from dualspeed.method.sequences import Sequences

LossFunction = Callable[..., Tensor]
"""Function of the outputs, the labels and `num_items_in_batch`, as the stock trainer's `compute_loss_func`."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Target of the labels; the default is the cross-entropy of the supervised tokens."""

    label_smoothing: float = 0.0
    """Share of each target's probability that is spread over the whole vocabulary."""
    function: LossFunction | None = None
    """Function that takes the cross-entropy's place. It gets all logits (B, L, V) of the sequences that were run, their
    labels (B, L), and the number of supervised tokens of the whole step, None if it isn't known."""
    all_logits: bool = False
    """True returns the logits of all positions, with their labels, as the stock model does."""
    packs: bool = False
    """True runs the rows of a batch behind one another, without padding, where not all logits are needed."""

    @property
    def needs_all_logits(self) -> bool:
        """True if the logits of all positions are computed."""
        return self.all_logits or self.function is not None

    def logits(
        self, vlm: PreTrainedModel, inputs: Sequences, images: ModelOutput | None
    ) -> tuple[Tensor, DualSpeedOutput | None]:
        """(M, V) logits of the supervised tokens, and if `needs_all_logits` all of them with their labels."""
        if not self.needs_all_logits:
            return (packed_logits if self.packs else supervised_logits)(vlm, inputs, images), None
        whole = DualSpeedOutput(logits=every_logit(vlm, inputs, images), labels=inputs.labels)
        return at_supervised(whole.logits, inputs), whole

    def loss(
        self, logits: Tensor, labels: Tensor, whole: DualSpeedOutput | None, num_items: Tensor | int | None
    ) -> Tensor:
        """First term of the loss.

        Args:
            logits: (M, V) at the supervised tokens.
            labels: (B, L) of the full sequences.
            whole: all logits and their labels, if `needs_all_logits`.
            num_items: supervised tokens of the whole step; None: M.
        """
        if self.function is not None and whole is not None:
            return self.function(whole, whole.labels, num_items_in_batch=num_items)
        targets = supervised_labels(labels, len(logits))
        return cross_entropy(logits, targets, at_least_one(logits, num_items), self.label_smoothing)


def at_least_one(logits: Tensor, num_items: Tensor | int | None) -> Tensor | int:
    """Divisor of a sum over tokens; the loss of a step without supervised tokens is 0."""
    if isinstance(num_items, Tensor):
        return num_items.clamp(min=1)
    return max(len(logits) if num_items is None else num_items, 1)
