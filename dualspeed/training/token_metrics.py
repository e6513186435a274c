"""Entropy and accuracy of the predicted tokens, as TRL's SFTTrainer logs them, without a host-device sync a step."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from dualspeed.method.losses import split_logits, supervised_labels, supervised_positions
from dualspeed.method.outputs import DualSpeedOutput


class TokenMetrics:
    """Sums of each micro-batch since the last record of the log, kept on the device."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._counts: list[Tensor] = []

    @torch.no_grad()
    def add(self, inputs: Mapping[str, Any], outputs: DualSpeedOutput) -> None:
        """Add a micro-batch; nothing if it has no labels."""
        if inputs.get("labels") is None:
            return
        logits, labels = supervised(inputs["labels"], outputs)
        input_ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        num_tokens = input_ids.new_full((), input_ids.numel()) if mask is None else mask.sum()
        self._sums.append(torch.stack([entropy(logits), (logits.argmax(-1) == labels).sum().float()]))
        self._counts.append(torch.stack([labels.new_full((), len(labels)), num_tokens.to(labels)]))

    def take(self, accelerator: Accelerator) -> tuple[dict[str, list[float]], int]:
        """Metrics of each micro-batch over all ranks, and the number of tokens that were read; begins anew.

        Each rank must call it.
        """
        if not self._sums:
            return {}, 0
        sums = accelerator.reduce(torch.stack(self._sums), "sum").tolist()
        counts = accelerator.reduce(torch.stack(self._counts), "sum").tolist()
        self._sums, self._counts = [], []
        means = [
            [value / supervised if supervised else 0.0 for value in values]
            for values, (supervised, _) in zip(sums, counts, strict=True)
        ]
        entropies, accuracies = map(list, zip(*means, strict=True))
        return {"entropy": entropies, "mean_token_accuracy": accuracies}, sum(tokens for _, tokens in counts)


def supervised(labels: Tensor, outputs: DualSpeedOutput) -> tuple[Tensor, Tensor]:
    """(M, V) logits and (M,) labels of the supervised tokens of a batch with these (B, L) labels."""
    if outputs.labels is None:
        return outputs.logits, supervised_labels(labels, len(outputs.logits))
    return outputs.logits[supervised_positions(outputs.labels)], supervised_labels(outputs.labels)


def entropy(logits: Tensor) -> Tensor:
    """Sum of the entropies of M predictions, in nats, of (M, V) logits."""
    total = logits.new_zeros((), dtype=torch.float32)
    for chunk in split_logits(logits):
        log_probabilities = F.log_softmax(chunk.float(), dim=-1)
        total = total - (log_probabilities.exp() * log_probabilities).sum()
    return total
