"""Image features of one's own in the forward of transformers before 5.18, which has no `mm_encoder_outputs`.

DualSpeedModel gives the stock forward the features that it has pruned, and asks for logits at supervised positions.
Older versions take neither. Here the forward of one model is replaced by one that takes both: the features are put
where the stock forward would have computed them, and the head is applied to the chosen positions alone. It serves
measurements on machines that have no newer version; the package itself demands one.
"""

import functools
import inspect
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

FIRST_VERSION = "5.18"
"""First version of transformers whose VLMs take `mm_encoder_outputs`."""


def takes_features(vlm: PreTrainedModel) -> bool:
    """True if the model's own forward takes `mm_encoder_outputs`."""
    return "mm_encoder_outputs" in inspect.signature(vlm.forward).parameters


def restore(vlm: PreTrainedModel) -> bool:
    """Give a model its own forward back, which generation needs; True if it was replaced."""
    is_replaced = "forward" in vars(vlm)
    if is_replaced:
        del vlm.forward, vlm.get_image_features
    return is_replaced


def let_take_features(vlm: PreTrainedModel) -> None:
    """Replace the forward of a model by one that takes `mm_encoder_outputs` and a mask as `logits_to_keep`."""
    stock, stock_features = vlm.forward, vlm.get_image_features

    @functools.wraps(stock_features)
    def get_image_features(*args: Any, **kwargs: Any) -> ModelOutput:
        output = stock_features(*args, **kwargs)
        if layers := getattr(output, "deepstack_features", None):
            output.deepstack_features = [[layer] if isinstance(layer, Tensor) else layer for layer in layers]
        return output

    def forward(
        input_ids: Tensor | None = None,
        mm_encoder_outputs: dict[str, ModelOutput] | None = None,
        logits_to_keep: int | Tensor = 0,
        **inputs: Any,
    ) -> ModelOutput:
        if mm_encoder_outputs is None:
            return stock(input_ids=input_ids, logits_to_keep=logits_to_keep, **inputs)
        if images := mm_encoder_outputs.get("image"):
            # The value is never read: that it is there makes the stock forward ask for features.
            inputs["pixel_values"] = torch.empty(1, device=vlm.device)
        with patch.object(vlm.model, "get_image_features", lambda *_, **__: with_whole_layers(images)):
            hidden = vlm.model(input_ids=input_ids, **inputs).last_hidden_state
        return ModelOutput(logits=vlm.lm_head(hidden[logits_to_keep]))

    vlm.forward, vlm.get_image_features = forward, get_image_features
    decoder = vlm.get_decoder()
    if not hasattr(decoder, "activation_checkpointing_enable"):  # its name before 5.23
        decoder.activation_checkpointing_enable = decoder.gradient_checkpointing_enable


def with_whole_layers(images: ModelOutput) -> ModelOutput:
    """Image features with one tensor for each DeepStack layer, as older versions take them, and not one an image."""
    if layers := getattr(images, "deepstack_features", None):
        return type(images)(
            pooler_output=images.pooler_output, deepstack_features=[torch.cat(list(layer)) for layer in layers]
        )
    return images
