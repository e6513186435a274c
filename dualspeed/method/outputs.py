"""Output of a DualSpeedModel: the losses of one batch and its logits."""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class DualSpeedOutput(ModelOutput):
    """Losses of one batch. `distillation_loss` is None in fast mode, and 0.0 in slow mode without a teacher."""

    # ModelOutput demands defaults; loss, ce_loss and logits are always set.
    loss: Tensor = None  # type: ignore[assignment]
    ce_loss: Tensor = None  # type: ignore[assignment]
    distillation_loss: Tensor | None = None
    logits: Tensor = None  # type: ignore[assignment]
    """(M, V) logits that predict the supervised tokens, sample after sample; (B, L, V) with `all_logits`."""
    labels: Tensor | None = None
    """(B, L) labels of the sequences that `logits` belong to, with `all_logits`; in fast mode these are shorter."""
