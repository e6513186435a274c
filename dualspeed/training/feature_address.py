"""Address of kept features: all that decides them beside the image itself."""

import hashlib
import json
from collections.abc import Collection
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, ProcessorMixin

from dualspeed.method.vlm.parts import parameter_parts
from dualspeed.method.vlm.tower_states import read_layers


def address_of(
    vlm: PreTrainedModel, processor: ProcessorMixin, fields: Collection[str], mixed_precision: str
) -> dict[str, Any]:
    """JSON value of tower, image processor, precision and kept fields.

    Args:
        fields: fields that are kept beside the layers' outputs.
        mixed_precision: accelerate's setting, by which the tower runs in another dtype than its own.
    """
    image_processor = processor.image_processor
    vision = vlm.config.vision_config
    return {
        "transformers": transformers.__version__,
        "tower": weights_digest(vlm),
        "model": type(vlm).__name__,
        "vision_config": as_json(vision.to_dict()),
        "attention": str(vision._attn_implementation),
        "layers": read_layers(vlm),
        "fields": sorted(fields),
        "mixed_precision": mixed_precision,
        "image_processor": [type(image_processor).__name__, as_json(image_processor.to_dict())],
    }


def weights_digest(vlm: PreTrainedModel) -> str:
    """SHA-256 of the tower's weights and their dtypes."""
    digest = hashlib.sha256()
    parts = parameter_parts(vlm)
    for parameter in vlm.parameters():
        if parts[parameter] == "vision":
            values = parameter.detach().cpu().contiguous()
            digest.update(f"{values.dtype} {tuple(values.shape)}".encode())
            digest.update(values.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def as_json(settings: dict[str, Any]) -> Any:
    """Settings as JSON, where what JSON doesn't know is its text."""
    return json.loads(json.dumps(settings, default=str, sort_keys=True))
