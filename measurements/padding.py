"""Share of padding in fast and slow steps, before and after samples are divided by tokens, without a model.

    python -m measurements.padding

The lengths are generated, not those of a real dataset. Shares and means are those that config/paper/config.yaml
estimates for LLaVA's mix665k: 93.9 % of the samples have an image of 576 visual tokens and 250 tokens of text, the
others 1,000 tokens of text, all cut at 2,048. The spread is an assumption: log-normal with SIGMA. p = 0.9, l = 4.
A step of LLaVA has 128 samples: 16 for each of 8 processes.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from transformers.trainer_pt_utils import LengthGroupedSampler

from dualspeed.settings.method import DualSpeedConfig
from dualspeed.training.grouping import pruned_unit_length
from dualspeed.training.micro_batches import in_order
from dualspeed.training.token_batches import Groups, padded_groups

NUM_SAMPLES, MAX_LENGTH, VISUAL = 32_768, 2048, 576
IMAGE_SHARE, TEXT, TEXT_ALONE, SIGMA = 0.939, 250, 1000, 0.8
BUDGETS = {"fast": (4096, 8192), "slow": (8192, 16_384)}
"""Tokens of a micro-batch, by mode; each is at least MAX_LENGTH."""
ORDERS = ("random", "group_by_length")


def main() -> None:
    """Print a table for each mode."""
    lengths = dict(zip(("fast", "slow"), generated(np.random.default_rng(0)), strict=True))
    means = ", ".join(f"{mode} {values.mean():.0f}" for mode, values in lengths.items())
    print(f"mix665k-like lengths, generated; mean tokens of a sample: {means}")
    for mode, budgets in BUDGETS.items():
        table = pd.DataFrame([*rows(lengths[mode], lengths["fast"], budgets)])
        print(f"\n{mode} steps\n\n{table.to_markdown(index=False)}")


def generated(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(NUM_SAMPLES,) lengths in fast and in slow steps."""
    has_image = generator.random(NUM_SAMPLES) < IMAGE_SHARE
    means = np.where(has_image, TEXT, TEXT_ALONE)
    # The mean of a log-normal variable is exp(mu + sigma^2 / 2).
    text = np.exp(generator.normal(np.log(means) - SIGMA**2 / 2, SIGMA)).astype(int) + 1
    text = np.minimum(text, MAX_LENGTH - VISUAL * has_image)
    return text + pruned_unit_length(VISUAL, DualSpeedConfig()) * has_image, text + VISUAL * has_image


def rows(lengths: np.ndarray, grouped_by: np.ndarray, budgets: tuple[int, ...]) -> Iterator[dict[str, str | int]]:
    """Lines of a mode's table.

    Args:
        lengths: of the samples in the mode.
        grouped_by: lengths that `group_by_length` goes by, those of most steps.
        budgets: values of tokens_per_batch.
    """
    for size in (16, 128):
        for order in ORDERS:
            steps = lengths[order_of(grouped_by, size, order)][: NUM_SAMPLES // size * size].reshape(-1, size)
            ways: dict[str, list[Groups]] = {"16 samples": [in_order(size, 16)] * len(steps)}
            for budget in budgets:
                ways[f"{budget:,} tokens"] = [padded_groups(step.tolist(), budget) for step in steps]
            for way, groups in ways.items():
                yield {"samples of a process": size, "order": order, "micro-batch": way} | figures(steps, groups)


def order_of(lengths: np.ndarray, size: int, order: str) -> np.ndarray:
    """Places of the samples in the order of an epoch."""
    if order == "random":
        return np.random.default_rng(1).permutation(len(lengths))
    generator = torch.Generator().manual_seed(1)
    return np.array(list(LengthGroupedSampler(size, lengths=lengths.tolist(), generator=generator)))


def figures(steps: np.ndarray, groups: list[Groups]) -> dict[str, str | int]:
    """Share of padding, micro-batches of a step, and tokens of the largest micro-batch."""
    padded = [
        [len(group) * step[group].max() for group in of_step] for step, of_step in zip(steps, groups, strict=True)
    ]
    total = sum(map(sum, padded))
    return {
        "padding": f"{1 - steps.sum() / total:.1%}",
        "micro-batches of a step": f"{np.mean([len(of_step) for of_step in groups]):.2f}",
        "largest, tokens": int(max(map(max, padded))),
    }


if __name__ == "__main__":
    main()
