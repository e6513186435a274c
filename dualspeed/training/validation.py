"""Validation during training: accuracy and cross-entropy on held-out answers.

An answer is a contiguous span of supervised tokens, that is, a turn. It is right if each of its tokens is the most
probable one, given the true tokens before it. Counts are per sample, so that they depend neither on the batch size nor
on the number of processes.

B samples, L length, M supervised tokens, A answers, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import EvalPrediction

from dualspeed.batch import IGNORE_INDEX
from dualspeed.method.losses import split_logits

VALIDATION_METRICS = {
    "eval_answer_accuracy": "validation/answer_accuracy",
    "eval_ce_loss": "validation/ce_loss",
    "eval_runtime": "validation/seconds",
}
"""Trainer's name of a metric -> name in the log; the trainer's other `eval_*` metrics follow from these."""


def count_answers(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, 4) counts of each sample: answers, right answers, supervised tokens, sum of the tokens' cross-entropies.

    Args:
        logits: (M, V) of the supervised tokens, sample after sample, or (B, L, V) of all.
        labels: (B, L) labels that the model was given.
    """
    targets = labels[:, 1:]
    supervised = targets != IGNORE_INDEX
    logits = logits[:, :-1][supervised] if logits.dim() == 3 else logits
    starts = supervised.clone()
    starts[:, 1:] &= ~supervised[:, :-1]
    targets = targets[supervised]
    chunks = split_logits(logits)
    targets_of = targets.split([len(chunk) for chunk in chunks])
    pairs = zip(chunks, targets_of, strict=True)
    losses = torch.cat([F.cross_entropy(chunk.float(), target, reduction="none") for chunk, target in pairs])

    is_wrong = logits.argmax(dim=-1) != targets
    answer_of_token = starts[supervised].cumsum(0) - 1
    num_wrong = torch.zeros(int(starts.sum()), device=logits.device).index_add(0, answer_of_token, is_wrong.float())
    right, loss_sums = torch.zeros(2, len(labels), device=logits.device)
    right.index_add_(0, starts.nonzero()[:, 0], (num_wrong == 0).float())
    loss_sums.index_add_(0, supervised.nonzero()[:, 0], losses)
    return torch.stack([starts.sum(1).float(), right, supervised.sum(1).float(), loss_sums], dim=1)


def mean_of_answers(counted: EvalPrediction) -> dict[str, float]:
    """Accuracy over all answers, 0 to 100, and mean cross-entropy of all their tokens, from `count_answers`."""
    answers, right, tokens, loss = counted.predictions.astype(float).sum(axis=0)
    return {"answer_accuracy": 100 * right / max(answers, 1), "ce_loss": loss / max(tokens, 1)}


def as_logged(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Copy of the trainer's `logs`: renames the `eval_*` metrics of VALIDATION_METRICS, drops the other ones."""
    names = {key: VALIDATION_METRICS.get(key, key) for key in logs}
    return {name: logs[key] for key, name in names.items() if not name.startswith("eval_")}
