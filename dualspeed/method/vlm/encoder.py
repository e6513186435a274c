"""The function of a VLM that turns images into features, and the inputs that it takes."""

import inspect
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import ModelOutput

UNNAMED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def body(vlm: PreTrainedModel) -> Any:
    """Module that holds tower, projector and language model: `vlm.model`, or the model itself if it has none."""
    return getattr(vlm, "model", vlm)


def image_encoders(vlm: PreTrainedModel) -> list[Callable[..., ModelOutput]]:
    """`get_image_features` of the model and of its body, where they have one."""
    return [owner.get_image_features for owner in (vlm, body(vlm)) if hasattr(owner, "get_image_features")]


def image_encoder(vlm: PreTrainedModel) -> Callable[..., ModelOutput]:
    """`get_image_features` of the model, or of its body if that names more inputs."""
    return max(image_encoders(vlm), key=lambda encoder: len(named_inputs(encoder)))


def named_inputs(encoder: Callable[..., Any]) -> list[str]:
    """Names of a function's arguments."""
    return [name for name, value in inspect.signature(encoder).parameters.items() if value.kind not in UNNAMED]


def accepted_inputs(vlm: PreTrainedModel) -> list[str]:
    """Names of the inputs that images come in."""
    return named_inputs(image_encoder(vlm))
