"""Batches that stand for an epoch: drawn as the training draws them, spread over their lengths."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from transformers import BatchFeature

from dualspeed.training.grouping import FULL_LENGTH
from dualspeed.training.trainer import DualSpeedTrainer

Row = dict[str, Any]
POSITION = "position"
"""Key of a row's position in the dataset, since ids may repeat."""


def drawn_batches(trainer: DualSpeedTrainer, number: int) -> dict[str, list[list[Row]]]:
    """Draw the rows of `number` optimizer steps as the trainer's epoch has them, the shortest first.

    All batches of an epoch are ordered by their tokens, where these are known, and divided into equal parts; the middle
    one of each is taken.

    Returns:
        `pruned`: the batches themselves. `baseline`: the same. Where the training groups samples by length, that is the
        pruned length, while Baseline's own training goes by the full one: there, `baseline` has the same samples,
        grouped by that.
    """
    dataset, args = trainer.train_dataset, trainer.args
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    order = np.array(list(trainer._get_train_sampler(dataset)))
    batches = np.resize(order, (max(1, len(order) // size), size))  # repeats the rows of a dataset that is too small
    lengths = np.array(dataset.data.column(FULL_LENGTH)) if hasattr(dataset, "data") else np.zeros(len(dataset))
    by_tokens = batches[np.argsort(lengths[batches].sum(axis=1), kind="stable")]
    chosen = by_tokens[[(2 * part + 1) * len(batches) // (2 * number) for part in range(number)]]
    regrouped = chosen
    if args.train_sampling_strategy == "group_by_length":
        positions = chosen.flatten()
        regrouped = positions[np.argsort(lengths[positions], kind="stable")].reshape(chosen.shape)
    read = {position: dataset[position] | {POSITION: position} for position in chosen.flatten().tolist()}
    return {
        name: [[read[position] for position in batch] for batch in ways.tolist()]
        for name, ways in (("pruned", chosen), ("baseline", regrouped))
    }


class OnceCollated:
    """Collator that collates each batch of `drawn_batches` once and keeps it."""

    def __init__(self, collate: Callable[[list[Row]], BatchFeature]) -> None:
        self._collate = collate
        self._batches: dict[tuple[int, ...], BatchFeature] = {}
        self._seconds = 0.0

    def __call__(self, rows: list[Row]) -> BatchFeature:
        """Return the batch of these rows; a copy, for the trainer moves it to its device in place."""
        key = tuple(row[POSITION] for row in rows)
        if key not in self._batches:
            started = time.perf_counter()
            self._batches[key] = self._collate(rows)
            self._seconds += time.perf_counter() - started
        return BatchFeature(dict(self._batches[key]))

    def mean_seconds(self) -> float:
        """Seconds of loading and collating a batch, in one process."""
        return self._seconds / len(self._batches)

    def mean_length(self) -> float:
        """Mean tokens of a row, padding and all visual tokens included."""
        return sum(batch["input_ids"].shape[1] for batch in self._batches.values()) / len(self._batches)
