"""Access to the vision tower that `get_image_features` doesn't offer.

Capturing what pruners need of its forward (attention, keys, features before the projector), and skipping the layers
after the selected one.
"""

import logging
import math
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from dualspeed.method.vlm.families import family_of
from dualspeed.method.vlm.parts import feature_layers, last_feature_layer, projector, vision_layers, vision_tower
from dualspeed.method.vlm.square_towers import heads_of, received

logger = logging.getLogger(__name__)


def selected_attention(vlm: PreTrainedModel) -> nn.Module:
    """Attention module of the last vision layer that the features depend on."""
    layer: Any = vision_layers(vlm)[last_feature_layer(vlm)]
    return next(getattr(layer, name) for name in ("self_attn", "attention", "attn") if hasattr(layer, name))


@contextmanager
def skip_unused_vision_layers(vlm: PreTrainedModel) -> Iterator[dict[str, int | list[int]]]:
    """Remove the vision layers after the selected one while the context is open.

    Yields the argument of `get_image_features` that selects the layer, counted from the front since the last layers are
    missing; nothing for families without a choice of layer.
    """
    family = family_of(vlm)
    if not family.selects_layer:
        yield {}
        return
    layers = vision_layers(vlm)
    # Installed once for all layers: hooks installed now would never capture the layers that are missing.
    maybe_install_capturing_hooks(attrgetter(family.tower)(vlm))
    owner, _, name = family.layers.rpartition(".")
    encoder = attrgetter(owner)(vision_tower(vlm))
    setattr(encoder, name, layers[: last_feature_layer(vlm) + 1])
    try:
        yield {"vision_feature_layer": feature_layers(vlm)}
    finally:
        setattr(encoder, name, layers)


@contextmanager
def capture_fields(vlm: PreTrainedModel, needs: Collection[str], captured: dict[str, Tensor]) -> Iterator[None]:
    """Capture the fields in `needs` during the tower's forward, into `captured`: (tiles, patches, ...) each.

    In families that merge patches they are (patches, ...), as the merger gets them, and `before_merger` is one of them;
    elsewhere it is left out. Attention and keys are computed from the q and k of the selected layer alone, so that all
    layers keep their fused attention. Keys are those before a rotation by positions, which would let the similarity of
    two keys fall with their distance.
    """
    first_patch = int(drops_first_position(vlm))
    merges = family_of(vlm).merges_patches
    inputs_of_projector = (
        {"pre_projection", "before_merger"} & set(needs) if merges else {"pre_projection"} & set(needs)
    )

    @torch.no_grad()
    def before_attention(attention: Any, args: tuple, kwargs: dict) -> None:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        with torch.autocast(hidden_states.device.type, enabled=False):  # as the pruners that read it
            if (dtype := attention.k_proj.weight.dtype).is_floating_point:  # 4-bit weights convert their input
                hidden_states = hidden_states.to(dtype)
            keys = projected_heads(attention, "k", hidden_states)
            if "keys" in needs:
                captured["keys"] = keys[:, first_patch:]
            if "cls_attention" in needs:
                mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
                scores = cls_attention if has_cls_token(vlm) else received_attention
                captured["cls_attention"] = scores(attention, hidden_states, keys.float(), mask)[:, first_patch:]

    @torch.no_grad()
    def before_rotary_attention(attention: Any, args: tuple, kwargs: dict) -> None:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        with torch.autocast(hidden_states.device.type, enabled=False):
            queries, keys = heads_of(attention, hidden_states)
            if "keys" in needs:
                captured["keys"] = keys
            if "cls_attention" in needs:
                positions, ends = kwargs["position_embeddings"], kwargs["cu_seqlens"]
                captured["cls_attention"] = received(attention, queries, keys, positions, ends)

    def before_projector(projector: nn.Module, args: tuple) -> None:
        captured.update(dict.fromkeys(inputs_of_projector, args[0].detach()))

    if "cls_attention" in needs and not has_cls_token(vlm):
        warn_of_missing_cls_token(type(vision_tower(vlm)).__name__)
    with ExitStack() as hooks:
        if {"cls_attention", "keys"} & set(needs):
            attention = selected_attention(vlm)
            hook = before_rotary_attention if merges else before_attention
            hooks.callback(attention.register_forward_pre_hook(hook, with_kwargs=True).remove)
        if inputs_of_projector:
            hooks.callback(projector(vlm).register_forward_pre_hook(before_projector).remove)
        yield


def drops_first_position(vlm: PreTrainedModel) -> bool:
    """True if the model drops the tower's first position, the CLS token's, as with LLaVA's strategy `default`."""
    strategy = getattr(vlm.config, "vision_feature_select_strategy", "full")
    return family_of(vlm).drops_first_position or strategy == "default"


def has_cls_token(vlm: PreTrainedModel) -> bool:
    """True if the tower's first position is a CLS token, as in CLIP and unlike SigLIP."""
    embeddings = getattr(vision_tower(vlm), "embeddings", None)
    return any(hasattr(embeddings, name) for name in ("class_embedding", "cls_token"))


@cache
def warn_of_missing_cls_token(tower: str) -> None:
    """Log, once per process, the substitute for CLS attention."""
    logger.warning("%s has no CLS token: pruners score tokens by the mean attention they receive instead", tower)


def per_token(values: Tensor, num_tokens: int) -> Tensor:
    """(tiles, patches, ...) -> (tiles, num_tokens, ...): means over the squares of patches behind each token.

    Tokens are in raster order; a token that stands for one patch keeps that patch's values.
    """
    if values.shape[1] == num_tokens:
        return values
    side, tokens_per_side = math.isqrt(values.shape[1]), math.isqrt(num_tokens)
    squares = values.unflatten(1, (tokens_per_side, side // tokens_per_side, tokens_per_side, side // tokens_per_side))
    return squares.mean(dim=(2, 4)).flatten(1, 2)


# torch's hints say nothing of a module's attributes, hence `attention: Any` below.
def projected_heads(attention: Any, side: str, hidden_states: Tensor) -> Tensor:
    """(B, L, C) -> (B, L, H, d) queries (side `q`) or keys (side `k`)."""
    projected = getattr(attention, f"{side}_proj")(hidden_states)
    norm = getattr(attention, f"{side}_norm", None)
    return (projected if norm is None else norm(projected)).unflatten(-1, (-1, attention.head_dim))


def cls_attention(attention: Any, hidden_states: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
    """(B, L) attention of position 0 to every position, mean over heads.

    Args:
        attention: an attention module of the tower.
        hidden_states: (B, L, C) its input.
        keys: (B, L, H, d) its keys in float32.
        mask: (B, 1, L, L), bool or additive, or (B, L) of the positions that are attended to; None: all.
    """
    query = projected_heads(attention, "q", hidden_states[:, :1]).float()
    scores = masked(torch.einsum("bqhd,bkhd->bhqk", query, keys) * attention.scale, mask, slice(1))
    return scores.softmax(dim=-1).mean(dim=1)[:, 0]


def received_attention(attention: Any, hidden_states: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
    """(B, L) attention to every position, mean over heads and over all query positions; arguments as above."""
    queries = projected_heads(attention, "q", hidden_states).float()
    received = [
        # One head at a time: (L, L) maps of all heads would be the largest tensor of the step.
        masked((query @ key.transpose(1, 2)).mul(attention.scale)[:, None], mask)[:, 0].softmax(dim=-1).mean(dim=1)
        for query, key in zip(queries.unbind(dim=2), keys.unbind(dim=2), strict=True)
    ]
    return torch.stack(received).mean(dim=0)


def masked(scores: Tensor, mask: Tensor | None, rows: slice = slice(None)) -> Tensor:
    """(B, H, R, L) attention scores of these query `rows`, with masked positions lowered."""
    if mask is None:
        return scores
    mask = mask[:, None, None].bool() if mask.dim() == 2 else mask[:, :, rows]
    # Finite, so that a fully masked row is uniform, not NaN.
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype is torch.bool else scores + mask
