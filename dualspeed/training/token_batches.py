"""Division of a step's samples into micro-batches of like length, up to a budget of tokens.

B samples of one process in one optimizer step, L length.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import TrainingArguments

from dualspeed.data.collator import ConversationCollator
from dualspeed.errors import ConfigError, SampleError
from dualspeed.method.packing import check_packing
from dualspeed.settings.method import DualSpeedConfig
from dualspeed.settings.modes import Mode
from dualspeed.training.grouping import FULL_LENGTH, NUM_IMAGE_TOKENS, pruned_lengths, pruned_unit_length
from dualspeed.training.micro_batches import in_order

if TYPE_CHECKING:
    from datasets import Dataset

    from dualspeed.training.mixin import DualSpeedMixin

Groups = list[list[int]]
"""Samples of each micro-batch, by their places in the batch."""


class Rows(NamedTuple):
    """Numbers of a batch's rows on the host; a list has one entry a row."""

    full: list[int]
    """Tokens that are attended to."""
    pruned: list[int]
    """Tokens in fast mode, isolators included; at most a few more than there really are."""
    extents: list[tuple[int, int]]
    """Columns of the first token and behind the last one."""


@dataclass(frozen=True)
class TokenBudgets:
    """Most tokens of a micro-batch on each device: its samples times the longest of them, or their sum if packed."""

    fast: int
    """In fast steps, after pruning."""
    slow: int
    """In slow steps, of all tokens."""

    def groups(self, rows: Rows, mode: Mode, packing: bool = False) -> Groups:
        """Micro-batches of a step in one mode; packed ones count no padding.

        Raises:
            SampleError: a sample is longer than the budget.
        """
        is_fast = mode is Mode.FAST
        lengths, budget = (rows.pruned, self.fast) if is_fast else (rows.full, self.slow)
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        if lengths[longest] > budget:
            name = "tokens_per_batch" if is_fast else "slow_tokens_per_batch"
            raise SampleError(
                f"sample {longest + 1} of the batch has {lengths[longest]} tokens in a {mode} step, {name} is "
                f"{budget}; valid: a larger budget, or max_length"
            )
        return (packed_groups if packing else padded_groups)(lengths, budget)


def token_budgets(
    args: TrainingArguments, fast: int | None, slow: int | None, slow_batch_size: int | None
) -> TokenBudgets | None:
    """Budgets of a trainer; None without `fast`.

    Args:
        fast, slow, slow_batch_size: `tokens_per_batch`, `slow_tokens_per_batch` and `slow_batch_size` of the trainer.

    Raises:
        ConfigError: an argument contradicts the budgets, or has no effect.
    """
    if fast is None:
        if slow is not None:
            raise ConfigError("slow_tokens_per_batch: has no effect without tokens_per_batch; valid: both, or None")
        return None
    for name, value in (("tokens_per_batch", fast), ("slow_tokens_per_batch", slow)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}: {value} is out of range; valid: above 0, or None")
    if slow_batch_size is not None:
        raise ConfigError("slow_batch_size: has no effect beside tokens_per_batch; valid: slow_tokens_per_batch")
    refused = {
        f"gradient_accumulation_steps: {args.gradient_accumulation_steps}, but tokens_per_batch divides the "
        "per_device_train_batch_size samples of a step itself; valid: 1": args.gradient_accumulation_steps > 1,
        "auto_find_batch_size: lowers the samples of a step, not the tokens_per_batch that decide its memory; valid: "
        "False": args.auto_find_batch_size,
        "train_sampling_strategy: 'batch_rebalance' makes micro-batches of full lengths, beside those of "
        "tokens_per_batch; valid: 'random', 'group_by_length' or 'sequential'": args.train_sampling_strategy
        == "batch_rebalance",
    }
    for reason, is_given in refused.items():
        if is_given:
            raise ConfigError(reason)
    return TokenBudgets(fast, fast if slow is None else slow)


def check_longest(budgets: TokenBudgets, longest: int | None) -> None:
    """Raise ConfigError unless a row of `longest` tokens is within both budgets; None: rows have no limit."""
    name, budget = min(
        (("tokens_per_batch", budgets.fast), ("slow_tokens_per_batch", budgets.slow)), key=lambda b: b[1]
    )
    if longest is None or longest > budget:
        found = "of any length" if longest is None else f"of up to {longest} tokens"
        raise ConfigError(f"{name}: {budget}, but rows may be {found}; valid: max_length, no larger than the budget")


def check_division(trainer: "DualSpeedMixin") -> None:
    """Raise ConfigError if a trainer's collator or its way of sharing the model doesn't go with its micro-batches."""
    if trainer.packing:
        check_packing(trainer.model.vlm, trainer.args.device)
        if trainer.args.neftune_noise_alpha:
            raise ConfigError(
                "neftune_noise_alpha: noise falls with a row's length, which packing changes; valid: None"
            )
        if trainer.compute_loss_func is not None:
            raise ConfigError("compute_loss_func: takes the rows of a batch, which packing joins; valid: None")
    if trainer.slow_batch_size is None and trainer.token_budgets is None:
        return
    if trainer.is_deepspeed_enabled:
        name = "slow_batch_size" if trainer.token_budgets is None else "tokens_per_batch"
        raise ConfigError(f"{name}: DeepSpeed's engine counts micro-batches itself; valid: None")
    if trainer.token_budgets is None:
        return
    if trainer.is_fsdp_enabled and not trainer.args.accelerator_config.even_batches:
        raise ConfigError(
            "accelerator_config: even_batches=False gives processes different numbers of samples, and FSDP needs as "
            "many micro-batches on each; valid: True, with tokens_per_batch"
        )
    if isinstance(trainer.data_collator, ConversationCollator):
        if not trainer.data_collator.with_num_images:
            raise ConfigError(
                "data_collator: doesn't give the num_images that tokens_per_batch needs; valid: "
                "ConversationCollator(processor, with_num_images=True)"
            )
        if FULL_LENGTH not in (getattr(trainer.train_dataset, "column_names", None) or ()):
            check_longest(trainer.token_budgets, trainer.data_collator.max_length)


def check_samples(dataset: "Dataset", budgets: TokenBudgets, method: DualSpeedConfig) -> None:
    """Raise ConfigError that names the longest sample of prepared data if it is above a budget."""
    checked = []
    if method.slow_steps is not None or method.slow_mode_ratio > 0:
        checked.append(("slow", "slow_tokens_per_batch", budgets.slow, np.array(dataset.data.column(FULL_LENGTH))))
    if method.slow_mode_ratio < 1 and NUM_IMAGE_TOKENS in dataset.column_names:
        checked.append(("fast", "tokens_per_batch", budgets.fast, pruned_lengths(dataset, method)))
    for mode, name, budget, lengths in checked:
        if lengths.max() <= budget:
            continue
        place = int(lengths.argmax())
        raise ConfigError(
            f"{name}: {budget}, but sample {dataset[place]['id']!r} has {lengths[place]} tokens in a {mode} step; "
            f"valid: at least {lengths[place]}, or a smaller max_length"
        )


def padded_groups(lengths: Sequence[int], budget: int) -> Groups:
    """Fewest groups of samples whose number times the longest is within the budget; among such, the least padding.

    Args:
        lengths: tokens of each sample, none of them above the budget.
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    best, starts = [(0, 0)], [0]  # (groups, padded tokens) of the longest samples, and where their last group starts
    for end in range(1, len(order) + 1):
        found = []
        for start in range(end - 1, -1, -1):
            padded = (end - start) * lengths[order[start]]
            if padded > budget:
                break  # a group that starts earlier has more samples, and a longer first one
            found.append((best[start][0] + 1, best[start][1] + padded, start))
        *cost, start = min(found)
        best.append((cost[0], cost[1]))
        starts.append(start)
    groups, end = [], len(order)
    while end > 0:
        groups.append(order[starts[end] : end])
        end = starts[end]
    return groups[::-1]


def packed_groups(lengths: Sequence[int], budget: int) -> Groups:
    """Groups of samples whose sum is within the budget: the longest first, each into the first group with room."""
    groups: Groups = []
    rooms: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        fitting = (number for number, room in enumerate(rooms) if room >= lengths[place])
        if (number := next(fitting, None)) is None:
            number = len(rooms)
            groups.append([])
            rooms.append(budget)
        groups[number].append(place)
        rooms[number] -= lengths[place]
    return groups


def split_to(groups: Groups, number: int) -> Groups:
    """Divide groups in two until there are `number` of them, the largest first."""
    groups = list(groups)
    while len(groups) < number:
        largest = max(range(len(groups)), key=lambda place: len(groups[place]))
        group = groups.pop(largest)
        middle = len(group) // 2
        groups += [group[:middle], group[middle:]]
    return groups


def read_rows(
    inputs: Mapping[str, Any], num_images: Sequence[int], image_token_id: int, method: DualSpeedConfig
) -> Rows:
    """Rows of a collated batch, with one host-device sync.

    Args:
        num_images: (B,) number of images of each sample.
    """
    input_ids: Tensor = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    attended = input_ids.new_ones(()) if mask is None else mask.bool()
    kinds = (attended * (1 + (input_ids == image_token_id).int())).expand_as(input_ids).cpu().numpy()
    tiles = inputs["pixel_values"].shape[1] if method.prune_budget == "tile" and "pixel_values" in inputs else 1
    full = (kinds > 0).sum(axis=1).tolist()
    pruned = [
        length
        + sum(pruned_unit_length(run, method) - run for run in runs)
        # Images without text between them are one run, and the tiles of an image always are.
        + method.num_virtual_tokens * max(count * tiles - len(runs), 0)
        for length, runs, count in zip(full, map(runs_of, kinds == 2), num_images, strict=True)
    ]
    places = [np.flatnonzero(row) for row in kinds]
    extents = [(int(found[0]), int(found[-1]) + 1) if len(found) else (0, 1) for found in places]
    return Rows(full, pruned, extents)


def division(
    trainer: "DualSpeedMixin", inputs: Mapping[str, Any], num_images: list[int] | None
) -> tuple[Groups, list[tuple[int, int]] | None]:
    """Samples of each micro-batch of a step, and the columns of each sample's tokens where the host knows them.

    Args:
        inputs: the samples of a process in the step, as they are collated.
        num_images: (B,) number of images of each; None: the collator doesn't give it.

    Raises:
        SampleError: samples are to be divided without `num_images`, or one is longer than the budget.
    """
    budgets, num_samples = trainer.token_budgets, len(inputs["input_ids"])
    mode = trainer.mode_of_step(trainer.state.global_step)
    size = num_samples if mode is Mode.FAST else trainer.slow_batch_size or num_samples
    if budgets is None and size >= num_samples:
        return [list(range(num_samples))], None
    if num_images is None:
        name = "slow_batch_size" if budgets is None else "tokens_per_batch"
        raise SampleError(f"{name} needs `num_images` in each batch, which the data collator doesn't give")
    if budgets is None:
        return in_order(num_samples, size), None
    model = trainer.inner_model
    rows = read_rows(inputs, num_images, model.config.image_token_id, model.dualspeed)
    groups = budgets.groups(rows, mode, trainer.packing)
    if trainer.is_fsdp_enabled:  # each forward pass gathers weights from all ranks
        number = trainer.accelerator.gather(torch.tensor([len(groups)], device=trainer.args.device))
        groups = split_to(groups, int(number.max()))
    return groups, rows.extents


def runs_of(is_image: np.ndarray) -> list[int]:
    """Lengths of the runs of True in a (L,) row."""
    edges = np.flatnonzero(np.diff(is_image.astype(np.int8), prepend=0, append=0))
    return (edges[1::2] - edges[::2]).tolist()
