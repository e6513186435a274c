"""Tokens that a training in bfloat16 keeps, beside those that float32 keeps.

    python -m measurements.selection CHECKPOINT BENCHMARK FOLDER [--pictures 50] [--chat-template turns]

For each pruning method that fits the checkpoint it prints the mean share of tokens that a fast step under bfloat16
autocast has in common with one in float32: from pixels to kept tokens, so that the features differ too. The second
column is the same if the method itself ran in autocast, which `dualspeed.pruners.contract` prevents.
"""

import argparse
import statistics
from contextlib import nullcontext
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from transformers import BatchFeature

from dualspeed.benchmarks import get_benchmark
from dualspeed.chat_templates import TEMPLATE_NAMES
from dualspeed.data.collator import generation_inputs
from dualspeed.data.processing import load_processor
from dualspeed.device import best_device, machine
from dualspeed.method.checkpoint import load_vlm
from dualspeed.method.fast_mode import PrunerResult, observe_pruning
from dualspeed.method.model import DualSpeedModel
from dualspeed.pruners import MergedTokens, VisualTokens
from dualspeed.reporting.figures.kept_tokens import models_by_pruner, pick_questions
from dualspeed.settings.modes import Mode
from dualspeed.settings.names import PRUNER_LABELS

Units = list[set[int]]
"""Kept tokens of each unit of pruning, an image or one of its tiles."""


def main() -> None:
    """Print a row for each method."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("benchmark")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=int, default=50)
    parser.add_argument("--pruning-ratio", type=float, default=0.9)
    parser.add_argument("--chat-template", default="vicuna_v1", choices=TEMPLATE_NAMES)
    options = parser.parse_args()
    processor = load_processor(options.checkpoint, options.chat_template)
    vlm = load_vlm(options.checkpoint, dtype=torch.float32).to(best_device()).eval()
    questions = pick_questions(get_benchmark(options.benchmark).load_questions(options.folder), options.pictures)
    rows = []
    for name, model in models_by_pruner(vlm, options.pruning_ratio).items():
        tokenizer = model.question_tokenizer(processor)
        inputs = [
            generation_inputs(processor, [{"image": question.image, "prompt": question.prompt}], "left", tokenizer)
            for question in questions
        ]
        shares = [shares_in_common(model, values.to(vlm.device)) for values in inputs]
        trained, rounded = (f"{100 * statistics.mean(column):.1f} %" for column in zip(*shares, strict=True))
        rows.append({"pruner": PRUNER_LABELS[name], "in common": trained, "method in autocast too": rounded})
    print(f"{len(questions)} pictures, p = {options.pruning_ratio}, {machine()}, torch {torch.__version__}")
    print(pd.DataFrame(rows).to_markdown(index=False))


def shares_in_common(model: DualSpeedModel, inputs: BatchFeature) -> tuple[float, float]:
    """Shares of float32's kept tokens that bfloat16 training keeps: as it is, and with the method in autocast too."""
    expected, _ = kept_tokens(model, inputs, in_autocast=False)
    trained, rounded = kept_tokens(model, inputs, in_autocast=True)
    return share(trained, expected), share(rounded, expected)


def share(kept: Units, expected: Units) -> float:
    """Mean over the units of the share of `expected` that is in `kept`."""
    return statistics.mean(len(one & other) / len(other) for one, other in zip(kept, expected, strict=True))


@torch.no_grad()
def kept_tokens(model: DualSpeedModel, inputs: BatchFeature, in_autocast: bool) -> tuple[Units, Units]:
    """Kept tokens of a fast step, and those that the method's function alone keeps of the same tokens."""
    seen: list[tuple[Units, Units]] = []

    def record(prune: object, tokens: VisualTokens) -> PrunerResult:
        result = prune()  # type: ignore[operator]
        indices = indices_of(result)
        alone = model.pruner.select(tokens, (indices >= 0).sum(dim=1).cpu())
        seen.append((as_units(indices), as_units(indices_of(alone))))
        return result

    context = torch.autocast(model.device.type, torch.bfloat16) if in_autocast else nullcontext()
    with context, observe_pruning(model, record):
        model(**inputs, mode=Mode.FAST)
    return seen[0]


def indices_of(result: PrunerResult) -> Tensor:
    """(B, K) kept positions, -1 beyond an image's budget."""
    return result.indices if isinstance(result, MergedTokens) else result


def as_units(indices: Tensor) -> Units:
    """Sets of the rows' positions."""
    return [{position for position in row if position >= 0} for row in indices.tolist()]


if __name__ == "__main__":
    main()
