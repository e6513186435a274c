"""What each pruning method keeps of a picture, drawn on what the vision tower sees of it.

One model serves all methods, so that they choose among the same tokens. Of an any-resolution image its overview tile is
drawn. Needs torch and a checkpoint, and is therefore a command of its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from math import ceil, isqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, PreTrainedModel, ProcessorMixin

from dualspeed.benchmarks import Question, get_benchmark
from dualspeed.data.collator import generation_inputs
from dualspeed.method.model import DualSpeedModel, load_vlm
from dualspeed.method.vlm.families import has_3d_positions
from dualspeed.method.vlm.vision import has_packed_tiles
from dualspeed.pruners import MergedTokens, VisualTokens
from dualspeed.reporting.figures.style import DARK, empty_figure, styled, write_figure
from dualspeed.settings.method import DualSpeedConfig
from dualspeed.settings.modes import Mode
from dualspeed.settings.names import PRUNER_LABELS

COLUMNS = 6
FADED = 0.82  # how white a token becomes that is not kept


def draw_kept_tokens(
    model_folder: Path, out: Path, benchmark: str, folder: str, pruning_ratio: float, num_pictures: int
) -> None:
    """Write `out` with the suffixes .png and .svg: pictures of a benchmark, once whole and once for each method.

    Args:
        model_folder: a checkpoint with its processor; methods that it can't be pruned by are left out.
        benchmark, folder: whose questions are shown, and where its official files lie.
    """
    processor = AutoProcessor.from_pretrained(model_folder)
    vlm = load_vlm(model_folder).to("cuda" if torch.cuda.is_available() else "cpu").eval()
    models = models_by_pruner(vlm, pruning_ratio)
    if has_3d_positions(vlm) or not models:
        # Qwen's towers take loose patches of any number, which make no square.
        with styled():
            return write_figure(empty_figure(f"Kept tokens: not drawn for {type(vlm).__name__}"), out)
    questions = pick_questions(get_benchmark(benchmark).load_questions(Path(folder)), num_pictures)
    lines = ceil((1 + len(models)) / COLUMNS)
    with styled():
        figure = Figure(figsize=(1.75 * COLUMNS, (2.05 * lines + 0.4) * len(questions)))
        blocks = figure.subfigures(len(questions), 1, squeeze=False).flat
        for block, question in zip(blocks, questions, strict=True):
            block.suptitle(question.prompt.split("\n")[0], fontsize=10.5)
            panels = block.subplots(lines, COLUMNS).flat
            draw_question(list(panels), models, processor, question)
        write_figure(figure, out)


def models_by_pruner(vlm: PreTrainedModel, pruning_ratio: float) -> dict[str, DualSpeedModel]:
    """The same weights under each method that the model can be pruned by."""
    models = {}
    for name in PRUNER_LABELS:
        config = DualSpeedConfig(pruner=name, pruning_ratio=pruning_ratio, num_virtual_tokens=0)
        try:
            models[name] = DualSpeedModel(vlm, config).eval()
        except ValueError:
            continue  # its vision tower doesn't offer what the method looks at
    return models


def pick_questions(questions: list[Question], number: int) -> list[Question]:
    """The first question of each of `number` pictures, spread evenly over the benchmark."""
    by_image = {question.image: question for question in reversed(questions) if question.image is not None}
    firsts = [question for question in questions if question.image is not None and by_image[question.image] is question]
    return firsts[:: max(1, len(firsts) // number)][:number]


def draw_question(
    panels: list[Axes], models: dict[str, DualSpeedModel], processor: ProcessorMixin, question: Question
) -> None:
    """One picture, whole in the first panel and as each method keeps it in the next ones."""
    inputs = generation_inputs(processor, [{"image": question.image, "prompt": question.prompt}])
    picture = seen_by_tower(inputs["pixel_values"], processor)
    for axes in panels:
        axes.axis("off")
    panels[0].imshow(picture)
    for axes, (name, model) in zip(panels[1:], models.items(), strict=False):
        kept, side = kept_positions(model, inputs)
        axes.imshow(fade(picture, kept, side))
        outline(axes, picture.shape, kept, side)
        axes.set_title(f"{PRUNER_LABELS[name]} ({len(kept)})", fontsize=9, pad=3)
        panels[0].set_title(f"all tokens ({side * side})", fontsize=9, pad=3)


@torch.no_grad()
def kept_positions(model: DualSpeedModel, inputs: BatchFeature) -> tuple[np.ndarray, int]:
    """(K,) positions that fast mode keeps of the first image (of its overview tile), and the side of their grid."""
    with record_choice(model) as choices:
        model(**inputs.to(model.device, dtype=model.vlm.dtype), mode=Mode.FAST)
    indices, num_tokens = choices[0]
    vision = model.config.vision_config
    side = vision.image_size // vision.patch_size if has_packed_tiles(model.vlm) else isqrt(num_tokens)
    kept = indices[(indices >= 0) & (indices < side * side)]
    return kept.cpu().numpy(), side


@contextmanager
def record_choice(model: DualSpeedModel) -> Iterator[list[tuple[Tensor, int]]]:
    """Collect (kept indices (K,), number of tokens) of the first unit in each call of the model's pruner."""
    pruner = model.pruner
    choices: list[tuple[Tensor, int]] = []

    @wraps(pruner)
    def wrapped(tokens: VisualTokens, num_keep: Tensor) -> Any:
        chosen = pruner(tokens, num_keep)
        indices = chosen.indices if isinstance(chosen, MergedTokens) else chosen
        choices.append((indices[0], int(tokens.valid()[0].sum())))
        return chosen

    model.pruner = wrapped  # type: ignore[assignment]  # to mypy, functions have no attributes
    try:
        yield choices
    finally:
        model.pruner = pruner


def seen_by_tower(pixel_values: Tensor, processor: ProcessorMixin) -> np.ndarray:
    """(H, W, 3) in [0, 1]: the first image as the tower gets it, its normalisation undone; of tiles the first."""
    pixels = pixel_values[0, 0] if pixel_values.dim() == 5 else pixel_values[0]
    mean, std = np.array(processor.image_processor.image_mean), np.array(processor.image_processor.image_std)
    return np.clip(pixels.float().permute(1, 2, 0).numpy() * std + mean, 0, 1)


def fade(picture: np.ndarray, kept: np.ndarray, side: int) -> np.ndarray:
    """The picture with every token but the kept ones faded to near white."""
    height, width = picture.shape[:2]
    mask = np.zeros(side * side, dtype=bool)
    mask[kept] = True
    rows, columns = np.arange(height) * side // height, np.arange(width) * side // width
    is_kept = mask.reshape(side, side)[rows[:, None], columns[None]][..., None]
    return np.where(is_kept, picture, FADED + (1 - FADED) * picture)


def outline(axes: Axes, shape: tuple[int, ...], kept: np.ndarray, side: int) -> None:
    """Frame each kept token: on a pale picture fading alone shows little."""
    height, width = shape[0] / side, shape[1] / side
    for row, column in zip(kept // side, kept % side, strict=True):
        corner = (column * width - 0.5, row * height - 0.5)  # pixels are drawn around whole numbers
        axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=DARK, linewidth=0.8))
