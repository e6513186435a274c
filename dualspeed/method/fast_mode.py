"""Fast mode: encode the images of a batch, choose the visual tokens to keep, and shorten the sequences to them.

B samples, L length, U units of pruning (an image, or one of its tiles), K tokens kept, P visual tokens of the batch,
D width of the language model, l length of the isolator.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import ModelOutput

from dualspeed.errors import ModelError
from dualspeed.method.host_counts import to_device
from dualspeed.method.relevance import mean_similarity, sample_of_token, similarity_by_llm
from dualspeed.method.sequences import Sequences, placeholder_runs, prune_inputs
from dualspeed.method.vlm.evaluation_mode import evaluation_mode
from dualspeed.method.vlm.inputs import blank_image, image_seeds
from dualspeed.method.vlm.pixel_pruning import KeptSquares
from dualspeed.method.vlm.tower_states import TowerStates
from dualspeed.method.vlm.vision import EncodedImages, encode_images, pruning_units
from dualspeed.pruners import MergedTokens, VisualTokens
from dualspeed.pruners.selection import prefix_mask
from dualspeed.settings.budget import num_tokens_to_keep

if TYPE_CHECKING:
    from dualspeed.method.model import DualSpeedModel

PrunerResult = Tensor | MergedTokens
PruningObserver = Callable[[Callable[[], PrunerResult], VisualTokens], PrunerResult]
"""Function (prune, tokens) that calls `prune()` once and returns its result; `tokens` is the pruner's input."""


@contextmanager
def observe_pruning(model: "DualSpeedModel", observer: PruningObserver) -> Iterator[None]:
    """Route each call of the model's pruner through `observer` while the context is open: to time it, or to see it."""
    previous = model.pruning_observer
    model.pruning_observer = observer
    try:
        yield
    finally:
        model.pruning_observer = previous


def encode_batch(
    model: "DualSpeedModel",
    images: dict[str, Tensor],
    grids: Sequence[Sequence[int]] | None = None,
    states: TowerStates | None = None,
) -> EncodedImages:
    """Encode the images of a batch, or a blank one if `images` is empty.

    Args:
        grids: `RowCounts.grids` for fast mode, which leaves squares of patches out of the tower if the setting
            `pixel_pruning` says so; None: all enter.
        states: kept outputs of the tower's layers for these images; None: the tower runs.
    """
    return encode_images(
        model.vlm,
        images or blank_image(model.vlm),
        needs={*model.pruner.needs, *model.pruner.optional, *(["pre_projection"] if model.clip_relevance else [])},
        with_tiles=model.dualspeed.prune_budget == "tile",
        pixel_pruning=model.dualspeed.pixel_pruning if images and grids is not None else None,
        grids=grids or (),
        states=None if states is None else states.to(model.device),
    )


def pruning_seeds(model: "DualSpeedModel", encoded: EncodedImages, pruning_seed: int) -> Tensor | None:
    """(images,) int64 seeds for pruners that draw at random; None for others, which saves reading every pixel."""
    if "seeds" not in model.pruner.needs:
        return None
    return image_seeds(model.vlm, encoded.inputs, [len(features) for features in encoded.features], pruning_seed)


def prune_batch(
    model: "DualSpeedModel", inputs: Sequences, images: EncodedImages, seeds: Tensor | None, padding_side: str = "right"
) -> tuple[Sequences, ModelOutput]:
    """Shorten a batch to its kept tokens.

    Args:
        inputs: the sequences with all tokens.
        seeds: one an image, as from `pruning_seeds`.

    Returns:
        the shortened sequences, and the image features that go with them: isolator and kept tokens of each unit.
    """
    if images.family.encodes_tokens_alone:
        images, seeds = images.in_runs(placeholder_runs(inputs, model.config.image_token_id), seeds)
    features = torch.cat(images.features)
    units, unit_seeds = pruning_units(images, seeds)
    num_keep = budgets(images, units, model.dualspeed.pruning_ratio)
    described = images.described
    if model.pruner.reads_text:
        with torch.autocast(features.device.type, enabled=False):  # as the pruners themselves
            described = described | text_fields(model, of_encoded(inputs, images), features, described)
    kept, kept_features = keep_tokens(model, features, units, num_keep, described, unit_seeds)

    num_copies = torch.zeros(sum(images.num_placeholders), dtype=torch.long, device=features.device)
    placeholders = kept if images.squares is None else placeholders_of(kept, images.squares)
    num_copies[torch.cat(placeholders)] = 1
    num_copies[torch.stack([unit[0] for unit in placeholders])] += model.dualspeed.num_virtual_tokens
    isolator = [] if model.mode_isolator is None else [model.mode_isolator().to(features.dtype)]
    unit_features = [torch.cat([*isolator, vectors]) for vectors in kept_features]
    copies = copies_per_image(images, units, unit_features)
    shortened = prune_inputs(inputs, model.config.image_token_id, num_copies, padding_side, copies)
    return shortened, images.keeping(unit_features, kept, model.dualspeed.num_virtual_tokens)


def budgets(images: EncodedImages, units: list[Tensor], pruning_ratio: float) -> Tensor:
    """(U,) tokens to keep of each unit: the share of its tokens before squares were left out, if as many entered."""
    sizes = list(map(len, units))
    before = sizes if images.squares is None else images.squares.before
    return torch.tensor(
        [min(size, num_tokens_to_keep(full, pruning_ratio)) for size, full in zip(sizes, before, strict=True)]
    )


def of_encoded(inputs: Sequences, images: EncodedImages) -> Sequences:
    """`inputs` whose counts of placeholders are those of the encoded tokens, for pruners that read the text."""
    if images.squares is None or inputs.counts is None:
        return inputs
    ends = torch.tensor(inputs.counts.placeholders).cumsum(0)
    rows = torch.bucketize(images.squares.indices, ends, right=True)
    encoded = rows.bincount(minlength=len(ends)).tolist()
    return inputs._replace(counts=inputs.counts._replace(placeholders=encoded))


def placeholders_of(kept: list[Tensor], squares: KeptSquares) -> list[Tensor]:
    """Positions of kept tokens among all placeholders, given those among the squares that entered the tower."""
    indices = to_device(squares.indices, kept[0])
    return [indices[positions] for positions in kept]


def copies_per_image(images: EncodedImages, units: list[Tensor], unit_features: list[Tensor]) -> list[tuple[int, int]]:
    """(tokens, vectors that take their place) of each image.

    Args:
        units, unit_features: positions of each unit's tokens, and the vectors that its tokens become.
    """
    ends = list(accumulate(len(features) for features in images.features))
    num_vectors = [0] * len(ends)
    for unit, vectors in zip(units, unit_features, strict=True):
        num_vectors[bisect_right(ends, int(unit[0]))] += len(vectors)
    return list(zip(images.num_placeholders, num_vectors, strict=True))


def keep_tokens(
    model: "DualSpeedModel",
    features: Tensor,
    units: list[Tensor],
    num_keep: Tensor,
    described: dict[str, Tensor],
    seeds: Tensor | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Choose the tokens of each unit that stay.

    Args:
        features: (P, D) projected features of the batch.
        units: positions in `features` of each unit's tokens, ascending, on the CPU.
        num_keep: (U,) tokens to keep of each unit.
        described: (P, ...) further fields of VisualTokens.
        seeds: (U,) for pruners that draw at random.

    Returns:
        (K,) positions in `features` that stay of each unit, ascending, and the (K, D) vectors there.
    """
    positions = to_device(pad_sequence(units, batch_first=True), features)
    num_tokens = torch.tensor([len(unit) for unit in units])
    tokens = VisualTokens(
        features=features[positions],
        mask=prefix_mask(num_tokens, positions),
        seeds=seeds,
        num_tokens=num_tokens,
        **{name: values[positions] for name, values in described.items()},
    )
    chosen = call_pruner(model, tokens, num_keep)
    indices = chosen.indices if isinstance(chosen, MergedTokens) else chosen
    counts = num_keep.tolist()
    kept = [row[:k] for row, k in zip(positions.gather(1, indices.clamp(min=0)), counts, strict=True)]
    if isinstance(chosen, MergedTokens):
        return kept, [row[:k] for row, k in zip(chosen.features, counts, strict=True)]
    return kept, [features[unit] for unit in kept]


def call_pruner(model: "DualSpeedModel", tokens: VisualTokens, num_keep: Tensor) -> PrunerResult:
    """Call the model's pruner, through the observer if there is one."""
    if model.pruning_observer is None:
        return model.pruner(tokens, num_keep)
    return model.pruning_observer(lambda: model.pruner(tokens, num_keep), tokens)


def text_fields(
    model: "DualSpeedModel", inputs: Sequences, features: Tensor, described: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The field of VisualTokens that tells the pruner of the question of each visual token's sample."""
    similarity = text_similarity(model, inputs, features, described)
    if "text_similarity" in model.pruner.needs:
        return {"text_similarity": similarity}
    return {"relevance": mean_similarity(similarity)}


def text_similarity(
    model: "DualSpeedModel", inputs: Sequences, features: Tensor, described: dict[str, Tensor]
) -> Tensor:
    """(P, T) similarity of each visual token to each token, or CLIP's piece, of the question of its sample."""
    image_token_id = model.config.image_token_id
    if model.clip_relevance is None:
        embed = model.vlm.get_input_embeddings()
        with evaluation_mode(embed):  # without NEFTune's noise
            return similarity_by_llm(inputs, features, embed, image_token_id)
    if inputs.question_ids is None:
        raise ModelError(
            "relevance_clip needs question_ids: give ConversationCollator or generation_inputs "
            "question_tokenizer=model.question_tokenizer(processor)"
        )
    samples = sample_of_token(inputs, image_token_id)
    num_words = inputs.counted(image_token_id).question_tokens
    return model.clip_relevance(inputs.question_ids, described["pre_projection"], samples, num_words)
