"""Two things that a model's public `get_image_features` doesn't offer, for vision towers in the style of CLIP.

What pruners want to know of the tower's run (attention, keys, features before the projector), and leaving out the
layers after the selected one.
"""

import logging
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


def vision_encoder(vlm: PreTrainedModel) -> nn.Module:
    """The part of a CLIP-style vision tower that holds its layers."""
    tower = vlm.model.vision_tower
    return getattr(tower, "vision_model", tower).encoder


def positive_feature_layer(vlm: PreTrainedModel) -> int | list[int]:
    """The selected layer or layers, counted from the front; 0 is the embeddings' output."""
    num_states = vlm.config.vision_config.num_hidden_layers + 1
    selected = vlm.config.vision_feature_layer
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
    # As the model does with the features: drops the CLS token's place.
    first_patch = int(getattr(vlm.config, "vision_feature_select_strategy", "default") == "default")

    @torch.no_grad()
    def before_attention(attention: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        keys = split_heads(attention.k_proj(hidden_states), attention)
        if "keys" in needs:
            record["keys"] = keys[:, first_patch:]
        if "cls_attention" in needs:
            scores = cls_attention if has_cls_token(vlm) else received_attention
            record["cls_attention"] = scores(attention, hidden_states, keys)[:, first_patch:]

    def before_projector(projector: nn.Module, args: tuple) -> None:
        record["pre_projection"] = args[0].detach()

    with ExitStack() as hooks:
        if {"cls_attention", "keys"} & set(needs):
            layer = vision_encoder(vlm).layers[selected_vision_layer(vlm)]
            hooks.callback(layer.self_attn.register_forward_pre_hook(before_attention, with_kwargs=True).remove)
        if "pre_projection" in needs:
            projector = vlm.model.multi_modal_projector
            hooks.callback(projector.register_forward_pre_hook(before_projector).remove)
        yield


def has_cls_token(vlm: PreTrainedModel) -> bool:
    """Whether the tower's first position is a CLS token, as CLIP's is and SigLIP's isn't; says so once if not."""
    tower = vlm.model.vision_tower
    has_one = hasattr(getattr(tower, "vision_model", tower).embeddings, "class_embedding")
    if not has_one:
        note_missing_cls_token(type(tower).__name__)
    return has_one


@cache
def note_missing_cls_token(tower: str) -> None:
    """Log, once a process, what stands in for CLS attention."""
    logger.warning("%s has no CLS token: pruners score tokens by the mean attention they receive instead", tower)


def split_heads(projected: Tensor, attention: nn.Module) -> Tensor:
    """(B, L, H d) -> (B, L, H, d)."""
    return projected.unflatten(-1, (-1, attention.head_dim))


def cls_attention(attention: nn.Module, hidden_states: Tensor, keys: Tensor) -> Tensor:
    """(B, L) attention of position 0 to every position, mean over heads.

    Args:
        hidden_states: (B, L, C) the attention's input.
        keys: (B, L, H, d) its keys.
    """
    query = split_heads(attention.q_proj(hidden_states[:, :1]), attention)
    scores = torch.einsum("bqhd,bkhd->bhk", query, keys).float() * attention.scale
    return scores.softmax(dim=-1).mean(dim=1)


def received_attention(attention: nn.Module, hidden_states: Tensor, keys: Tensor) -> Tensor:
    """(B, L) attention to every position, mean over heads and over the positions it comes from; as `cls_attention`."""
    queries = split_heads(attention.q_proj(hidden_states), attention)
    received = [
        # Head by head: all (L, L) maps at once would be the largest tensor of the whole step.
        (query @ key.transpose(1, 2)).float().mul(attention.scale).softmax(dim=-1).mean(dim=1)
        for query, key in zip(queries.unbind(dim=2), keys.unbind(dim=2), strict=True)
    ]
    return torch.stack(received).mean(dim=0)
