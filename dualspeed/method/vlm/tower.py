"""Two things that a model's public `get_image_features` doesn't offer, for towers of blocks of plain attention.

What pruners want to know of the tower's run (attention, keys, features before the projector), and leaving out the
layers after the selected one.
"""

import logging
import math
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import maybe_install_capturing_hooks

logger = logging.getLogger(__name__)

SELECTING_FAMILIES = ("llava", "llava_next", "llava_onevision", "vipllava")
"""model_type of those whose features come from a layer that `vision_feature_layer` selects."""
RECORDED = ("cls_attention", "keys", "pre_projection")
"""Fields of VisualTokens that are read off the tower's run."""


def vision_tower(vlm: PreTrainedModel) -> nn.Module:
    """The vision tower without the wrapper that some classes put around it."""
    tower = vlm.model.vision_tower if hasattr(vlm.model, "vision_tower") else vlm.model.vision_model
    return getattr(tower, "vision_model", tower)


def vision_encoder(vlm: PreTrainedModel) -> nn.Module:
    """The part of a CLIP-style vision tower that holds its layers."""
    return vision_tower(vlm).encoder


def selected_attention(vlm: PreTrainedModel) -> nn.Module:
    """The attention of the last vision layer whose output the model uses."""
    encoder = vision_encoder(vlm)
    layers = encoder.layers if hasattr(encoder, "layers") else encoder.layer
    layer = layers[selected_vision_layer(vlm)]
    return layer.self_attn if hasattr(layer, "self_attn") else layer.attention


def projector(vlm: PreTrainedModel) -> nn.Module:
    """What turns the tower's output into visual tokens."""
    return vlm.model.multi_modal_projector if hasattr(vlm.model, "multi_modal_projector") else vlm.model.connector


def positive_feature_layer(vlm: PreTrainedModel) -> int | list[int]:
    """The selected layer or layers, counted from the front; 0 is the embeddings' output. The last without a choice."""
    num_states = vlm.config.vision_config.num_hidden_layers + 1
    selected = getattr(vlm.config, "vision_feature_layer", -1)
    return selected % num_states if isinstance(selected, int) else [layer % num_states for layer in selected]


def selected_vision_layer(vlm: PreTrainedModel) -> int:
    """Index of the last vision layer whose output the model uses."""
    selected = positive_feature_layer(vlm)
    return (max(selected) if isinstance(selected, list) else selected) - 1


@contextmanager
def skip_unused_vision_layers(vlm: PreTrainedModel) -> Iterator[dict[str, int | list[int]]]:
    """Leave out the vision layers after the selected one while the context is open; the model itself stays whole.

    Yields the argument of `get_image_features` that selects the layer counted from the front, since layers at the end
    are missing; nothing for models without a choice of layer.
    """
    if vlm.config.model_type not in SELECTING_FAMILIES:
        yield {}
        return
    encoder = vision_encoder(vlm)
    layers = encoder.layers
    # Installed once for all layers: done while some are missing, those would never be captured afterwards.
    maybe_install_capturing_hooks(vlm.model.vision_tower)
    encoder.layers = layers[: selected_vision_layer(vlm) + 1]
    try:
        yield {"vision_feature_layer": positive_feature_layer(vlm)}
    finally:
        encoder.layers = layers


@contextmanager
def record_tower(vlm: PreTrainedModel, needs: Collection[str], record: dict[str, Tensor]) -> Iterator[None]:
    """Put those of RECORDED that are in `needs` into `record` when the tower runs: (tiles, patches, ...) each.

    Attention and keys are computed from the selected layer's q and k alone, so that every layer keeps its fused
    attention.
    """
    first_patch = int(drops_first_position(vlm))

    @torch.no_grad()
    def before_attention(attention: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        keys = projected_heads(attention, "k", hidden_states)
        if "keys" in needs:
            record["keys"] = keys[:, first_patch:]
        if "cls_attention" in needs:
            mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
            scores = cls_attention if has_cls_token(vlm) else received_attention
            record["cls_attention"] = scores(attention, hidden_states, keys, mask)[:, first_patch:]

    def before_projector(projector: nn.Module, args: tuple) -> None:
        record["pre_projection"] = args[0].detach()

    with ExitStack() as hooks:
        if {"cls_attention", "keys"} & set(needs):
            attention = selected_attention(vlm)
            hooks.callback(attention.register_forward_pre_hook(before_attention, with_kwargs=True).remove)
        if "pre_projection" in needs:
            hooks.callback(projector(vlm).register_forward_pre_hook(before_projector).remove)
        yield


def drops_first_position(vlm: PreTrainedModel) -> bool:
    """Whether the model leaves out the tower's first position, the CLS token's, as LLaVA's `default` strategy does."""
    always = vlm.config.model_type == "vipllava"
    return always or getattr(vlm.config, "vision_feature_select_strategy", "full") == "default"


def has_cls_token(vlm: PreTrainedModel) -> bool:
    """Whether the tower's first position is a CLS token, as CLIP's is and SigLIP's isn't; says so once if not."""
    tower = vision_tower(vlm)
    has_one = any(hasattr(tower.embeddings, name) for name in ("class_embedding", "cls_token"))
    if not has_one:
        note_missing_cls_token(type(tower).__name__)
    return has_one


@cache
def note_missing_cls_token(tower: str) -> None:
    """Log, once a process, what stands in for CLS attention."""
    logger.warning("%s has no CLS token: pruners score tokens by the mean attention they receive instead", tower)


def per_token(values: Tensor, num_tokens: int) -> Tensor:
    """What belongs to patches, (tiles, patches, ...), for the tokens of each tile: (tiles, num_tokens, ...).

    Where a token stands for a square of patches (pixel shuffle, pooling), in raster order: their mean.
    """
    if values.shape[1] == num_tokens:
        return values
    side, tokens_per_side = math.isqrt(values.shape[1]), math.isqrt(num_tokens)
    squares = values.unflatten(1, (tokens_per_side, side // tokens_per_side, tokens_per_side, side // tokens_per_side))
    return squares.mean(dim=(2, 4)).flatten(1, 2)


def projected_heads(attention: nn.Module, which: str, hidden_states: Tensor) -> Tensor:
    """(B, L, C) -> (B, L, H, d) queries (`q`) or keys (`k`)."""
    projected = getattr(attention, f"{which}_proj")(hidden_states)
    norm = getattr(attention, f"{which}_norm", None)
    return (projected if norm is None else norm(projected)).unflatten(-1, (-1, attention.head_dim))


def cls_attention(attention: nn.Module, hidden_states: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
    """(B, L) attention of position 0 to every position, mean over heads.

    Args:
        hidden_states: (B, L, C) the attention's input.
        keys: (B, L, H, d) its keys.
        mask: (B, 1, L, L) of the positions that are attended to, bool or to be added; or (B, L); None: all.
    """
    query = projected_heads(attention, "q", hidden_states[:, :1])
    scores = masked(torch.einsum("bqhd,bkhd->bhqk", query, keys).float() * attention.scale, mask, slice(1))
    return scores.softmax(dim=-1).mean(dim=1)[:, 0]


def received_attention(attention: nn.Module, hidden_states: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
    """(B, L) attention to every position, mean over heads and over the positions it comes from; as `cls_attention`."""
    queries = projected_heads(attention, "q", hidden_states)
    received = [
        # Head by head: all (L, L) maps at once would be the largest tensor of the whole step.
        masked((query @ key.transpose(1, 2)).float().mul(attention.scale)[:, None], mask)[:, 0]
        .softmax(dim=-1)
        .mean(dim=1)
        for query, key in zip(queries.unbind(dim=2), keys.unbind(dim=2), strict=True)
    ]
    return torch.stack(received).mean(dim=0)


def masked(scores: Tensor, mask: Tensor | None, rows: slice = slice(None)) -> Tensor:
    """(B, H, R, L) scores without what a mask hides from those `rows`."""
    if mask is None:
        return scores
    mask = mask[:, None, None].bool() if mask.dim() == 2 else mask[:, :, rows]
    # Not -inf: a row may be hidden from all, and is then even.
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype is torch.bool else scores + mask
