"""Figure of the tokens that each pruning method keeps, drawn on the picture as the vision tower sees it.

One model serves all methods, so that they choose among the same tokens. Of an any-resolution image, the overview tile
is drawn. This figure needs torch and a checkpoint, so it has a command of its own.
"""

from collections.abc import Callable
from math import ceil, isqrt
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, PreTrainedModel, ProcessorMixin

from dualspeed.benchmarks import Question, get_benchmark
from dualspeed.data.collator import generation_inputs
from dualspeed.device import best_device
from dualspeed.errors import ModelError
from dualspeed.method.checkpoint import load_vlm
from dualspeed.method.fast_mode import observe_pruning
from dualspeed.method.model import DualSpeedModel
from dualspeed.method.vlm.families import family_of
from dualspeed.pruners import MergedTokens, VisualTokens
from dualspeed.reporting.figures.style import DARK, empty_figure, styled, write_figure
from dualspeed.settings.jobs import KeptTokensSettings
from dualspeed.settings.method import DualSpeedConfig
from dualspeed.settings.modes import Mode
from dualspeed.settings.names import PRUNER_LABELS

COLUMNS = 6
FADED = 0.82  # share of white in a token that is not kept


def draw_kept_tokens(model_folder: Path, out: Path, settings: KeptTokensSettings) -> None:
    """Write `out` with the suffixes .png and .svg: each picture whole, and once for each pruning method.

    Args:
        model_folder: checkpoint with its processor; methods that can't prune it are left out.
    """
    processor = AutoProcessor.from_pretrained(model_folder)
    vlm = load_vlm(model_folder).to(best_device()).eval()
    models = models_by_pruner(vlm, settings.pruning_ratio)
    if family_of(vlm).has_3d_positions or not models:
        # Towers of such families take any number of single patches, which need not form a square.
        with styled():
            return write_figure(empty_figure(f"Kept tokens: not drawn for {type(vlm).__name__}"), out)
    questions = get_benchmark(settings.benchmark).load_questions(Path(settings.folder))
    questions = pick_questions(questions, settings.num_pictures)
    num_lines = ceil((1 + len(models)) / COLUMNS)
    with styled():
        figure = Figure(figsize=(1.75 * COLUMNS, (2.05 * num_lines + 0.4) * len(questions)))
        blocks = figure.subfigures(len(questions), 1, squeeze=False).flat
        for block, question in zip(blocks, questions, strict=True):
            block.suptitle(question.prompt.split("\n")[0], fontsize=10.5)
            panels = block.subplots(num_lines, COLUMNS).flat
            draw_question(list(panels), models, processor, question)
        write_figure(figure, out)


def models_by_pruner(vlm: PreTrainedModel, pruning_ratio: float) -> dict[str, DualSpeedModel]:
    """The same weights with each pruner that fits the model."""
    models = {}
    for name in PRUNER_LABELS:
        config = DualSpeedConfig(pruner=name, pruning_ratio=pruning_ratio, num_virtual_tokens=0)
        try:
            models[name] = DualSpeedModel(vlm, config).eval()
        except ModelError:
            continue  # the vision tower lacks a field that the pruner needs
    return models


def pick_questions(questions: list[Question], number: int) -> list[Question]:
    """First question of each of `number` pictures, spread evenly over the benchmark."""
    by_image = {question.image: question for question in reversed(questions) if question.image is not None}
    firsts = [question for question in questions if question.image is not None and by_image[question.image] is question]
    return firsts[:: max(1, len(firsts) // number)][:number]


def draw_question(
    panels: list[Axes], models: dict[str, DualSpeedModel], processor: ProcessorMixin, question: Question
) -> None:
    """Draw one picture: whole in the first panel, then with the tokens that each method keeps."""
    inputs = generation_inputs(processor, [{"image": question.image, "prompt": question.prompt}])
    picture = tower_view(inputs["pixel_values"], processor)
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
    """Tokens that fast mode keeps of the first image, or of its overview tile.

    Returns:
        (K,) positions in the square grid of tokens, and the side of this grid.
    """
    choices: list[tuple[Tensor, int]] = []  # kept positions and number of tokens of the first unit, for each call

    def record_choice(prune: Callable[[], Tensor | MergedTokens], tokens: VisualTokens) -> Tensor | MergedTokens:
        chosen = prune()
        indices = chosen.indices if isinstance(chosen, MergedTokens) else chosen
        choices.append((indices[0], int(tokens.valid()[0].sum())))
        return chosen

    with observe_pruning(model, record_choice):
        model(**inputs.to(model.device, dtype=model.vlm.dtype), mode=Mode.FAST)
    indices, num_tokens = choices[0]
    vision = model.config.vision_config
    side = vision.image_size // vision.patch_size if family_of(model.vlm).packs_tiles else isqrt(num_tokens)
    kept = indices[(indices >= 0) & (indices < side * side)]
    return kept.cpu().numpy(), side


def tower_view(pixel_values: Tensor, processor: ProcessorMixin) -> np.ndarray:
    """(H, W, 3) in [0, 1]: input of the vision tower for the first image or its first tile, before normalization."""
    pixels = pixel_values[0, 0] if pixel_values.dim() == 5 else pixel_values[0]
    mean, std = np.array(processor.image_processor.image_mean), np.array(processor.image_processor.image_std)
    return np.clip(pixels.float().permute(1, 2, 0).numpy() * std + mean, 0, 1)


def fade(picture: np.ndarray, kept: np.ndarray, side: int) -> np.ndarray:
    """Picture with all tokens faded to near white, except the kept ones."""
    height, width = picture.shape[:2]
    mask = np.zeros(side * side, dtype=bool)
    mask[kept] = True
    rows, columns = np.arange(height) * side // height, np.arange(width) * side // width
    is_kept = mask.reshape(side, side)[rows[:, None], columns[None]][..., None]
    return np.where(is_kept, picture, FADED + (1 - FADED) * picture)


def outline(axes: Axes, shape: tuple[int, ...], kept: np.ndarray, side: int) -> None:
    """Draw a frame around each kept token; in a pale picture, fading alone is hard to see."""
    height, width = shape[0] / side, shape[1] / side
    for row, column in zip(kept // side, kept % side, strict=True):
        corner = (column * width - 0.5, row * height - 0.5)  # matplotlib centres pixels on whole numbers
        axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=DARK, linewidth=0.8))
