"""The check of a model before it is trained: its parts are found, and a blank image passes through them.

Nothing is left to fail in a later step: a model that lacks something is refused here, in one sentence.
"""

import inspect
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import attrgetter

import torch
from torch import nn
from transformers import PreTrainedModel

from dualspeed.errors import ModelError
from dualspeed.method.vlm.encoder import image_encoders
from dualspeed.method.vlm.evaluation_mode import evaluation_mode
from dualspeed.method.vlm.families import CAPTURED_FIELDS, ENCODER_DECODER, FAMILIES, REFUSED, family_of
from dualspeed.method.vlm.inputs import blank_image
from dualspeed.method.vlm.parts import language_parameters, parameter_parts, width_of_text
from dualspeed.method.vlm.vision import EncodedImages, encode_images
from dualspeed.pruners import PRUNERS

logger = logging.getLogger(__name__)

ADD_A_RECORD = (
    "a Family record for model type {model_type!r} in dualspeed/method/vlm/families.py can say where they are and how "
    "images come (CONTRIBUTING.md, A model)"
)


def check_model(vlm: PreTrainedModel, pruner: str, needs: tuple[str, ...], prune_budget: str) -> None:
    """Raise ModelError, with the reason, if a model can't be trained in fast mode, or not with this pruner."""
    check_interface(vlm)
    check_settings(vlm, pruner, needs, prune_budget)
    check_blank_image(vlm, needs)


def check_interface(vlm: PreTrainedModel) -> None:
    """Raise ModelError unless visual tokens stand in the model's sequence and features can take their places."""
    start = f"{type(vlm).__name__} can't be trained on pruned tokens, since "
    if vlm.config.model_type in REFUSED:
        raise ModelError(start + REFUSED[vlm.config.model_type])
    if vlm.config.is_encoder_decoder or getattr(vlm.config.get_text_config(), "is_encoder_decoder", False):
        raise ModelError(start + ENCODER_DECODER)
    lacking = [] if "mm_encoder_outputs" in inspect.signature(vlm.forward).parameters else ["mm_encoder_outputs"]
    lacks = [f"its forward takes no {name}" for name in lacking]
    lacks += [] if image_encoders(vlm) else ["it has no get_image_features"]
    lacks += [] if getattr(vlm.config, "image_token_id", None) is not None else ["its config has no image_token_id"]
    if lacks:
        raise ModelError(
            f"{start}{', '.join(lacks)}: visual tokens must stand in the sequence of the language model, and enter it "
            "as transformers' VLMs take them"
        )


def check_settings(vlm: PreTrainedModel, pruner: str, needs: tuple[str, ...], prune_budget: str) -> None:
    """Raise ModelError if the pruner or the budget doesn't go with the model."""
    family = family_of(vlm)
    captured = [name for name in needs if name in CAPTURED_FIELDS]
    if captured and not family.has_readable_tower:
        readable = [name for name, other in FAMILIES.items() if other.has_readable_tower]
        others = [name for name, other in PRUNERS.items() if not set(other.needs) & set(CAPTURED_FIELDS)]
        raise ModelError(
            f"pruner {pruner!r} looks at the vision tower's {', '.join(captured)}, which can be captured where the "
            "tower encodes each square tile by itself, or merges squares of patches, as in "
            f"{', '.join(readable)}, not in {type(vlm).__name__}; methods that need none of these work with any model: "
            f"{', '.join(others)}"
        )
    if prune_budget == "tile" and not family.has_tile_budget:
        raise ModelError(
            f"prune_budget 'tile' is for models that cut images into tiles, not for {type(vlm).__name__}; use 'image'"
        )


def check_blank_image(vlm: PreTrainedModel, needs: tuple[str, ...]) -> None:
    """Raise ModelError unless projector and tower are found and a blank image passes through them.

    A model on the meta device has no weights to run; then all but the values is checked where the device allows it.
    """
    name, hint = type(vlm).__name__, ADD_A_RECORD.format(model_type=vlm.config.model_type)
    check_parts(vlm, hint)
    calls: list[nn.Module] = []
    try:
        with (
            torch.no_grad(),
            mixed_dtypes(vlm),
            evaluation_mode(vlm),
            whole_visual_weights(vlm),
            noting_calls(vlm, calls),
        ):
            encoded = encode_images(vlm, blank_image(vlm), needs)
    except Exception as error:
        if vlm.device.type == "meta":
            logger.warning("%s has no weights (meta device): that images pass through it stays unproven", name)
            return
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{name}: a blank image doesn't pass through its vision tower: {reason}; {hint}") from error
    if not calls:
        raise ModelError(f"{name}: images don't pass through {family_of(vlm).tower!r}, its vision tower; {hint}")
    check_features(vlm, encoded, hint)


def check_parts(vlm: PreTrainedModel, hint: str) -> None:
    """Raise ModelError if the tower, the projector or the language model isn't found."""
    family = family_of(vlm)
    missing = []
    if family.tower:
        try:
            attrgetter(family.tower)(vlm)
        except AttributeError:
            missing.append(f"vision tower ({family.tower})")
    if not language_parameters(vlm):
        missing.append("language model")
    if not missing and "projector" not in parameter_parts(vlm).values():
        missing.append("projector")
    if missing:
        raise ModelError(f"{type(vlm).__name__}: its {' and '.join(missing)} can't be found; {hint}")


def check_features(vlm: PreTrainedModel, encoded: EncodedImages, hint: str) -> None:
    """Raise ModelError unless a blank image became tokens of the language model's width, as many as expected."""
    shapes = {tuple(features.shape) for features in encoded.features}
    width, expected = width_of_text(vlm), family_of(vlm).num_placeholders(vlm, encoded.inputs)
    if not shapes or any(len(shape) != 2 or shape[1] != width or shape[0] == 0 for shape in shapes):
        raise ModelError(
            f"{type(vlm).__name__}: a blank image becomes features of shape {', '.join(map(str, sorted(shapes)))}, not "
            f"(tokens, {width}), the width of its language model; {hint}"
        )
    num_tokens = sum(len(features) for features in encoded.features)
    if expected is not None and num_tokens != expected:
        raise ModelError(
            f"{type(vlm).__name__}: a blank image becomes {num_tokens} tokens, but its configuration says {expected}, "
            f"which is what a processor would write; {hint}"
        )


def mixed_dtypes(vlm: PreTrainedModel) -> AbstractContextManager:
    """Autocast for a model whose weights are of several dtypes, as mixed precision trains it; else no effect."""
    dtypes = {parameter.dtype for parameter in vlm.parameters() if parameter.is_floating_point()}
    if len(dtypes) < 2 or vlm.device.type == "meta":  # which has no autocast
        return nullcontext()
    return torch.autocast(vlm.device.type, torch.bfloat16)


@contextmanager
def noting_calls(vlm: PreTrainedModel, calls: list[nn.Module]) -> Iterator[None]:
    """Collect the calls of modules of the vision tower, or of the projector if there is no tower."""
    family = family_of(vlm)
    modules = [attrgetter(family.tower or family.projector[0])(vlm)]
    hooks = [
        module.register_forward_pre_hook(lambda module, args: calls.append(module))
        for root in modules
        for module in root.modules()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def whole_visual_weights(vlm: PreTrainedModel) -> Iterator[None]:
    """Gather what ZeRO-3 has in shards of tower and projector; every rank checks its model."""
    language = language_parameters(vlm)
    sharded = [p for p in vlm.parameters() if hasattr(p, "ds_id") and p not in language]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield
