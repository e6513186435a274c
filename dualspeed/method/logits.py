"""Logits of a stock VLM at the positions that predict supervised tokens, or at all of them.

B samples, L length, M supervised tokens, V vocabulary.
"""

import inspect
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from dualspeed.errors import SampleError
from dualspeed.method.losses import supervised_positions
from dualspeed.method.sequences import Sequences, mask_for_attention
from dualspeed.method.vlm.entrance import inputs_of_forward, runner
from dualspeed.pruners.selection import true_places


def supervised_logits(vlm: PreTrainedModel, inputs: Sequences, images: ModelOutput | None) -> Tensor:
    """(M, V) logits at the positions that predict a supervised token; no others are computed."""
    labels: Tensor = inputs.labels  # type: ignore[assignment]  # None in generation alone
    return run_vlm(vlm, inputs.input_ids, images, supervised_positions(labels), **arguments_of(inputs))


def every_logit(vlm: PreTrainedModel, inputs: Sequences, images: ModelOutput | None) -> Tensor:
    """(B, L, V) logits at all positions."""
    return run_vlm(vlm, inputs.input_ids, images, logits_to_keep=0, **arguments_of(inputs))


def arguments_of(inputs: Sequences) -> dict[str, Any]:
    """Arguments of the stock model beside tokens and images."""
    return {"attention_mask": mask_for_attention(inputs), **inputs.by_token}


def at_supervised(logits: Tensor, inputs: Sequences) -> Tensor:
    """(B, L, V) logits -> the (M, V) of them that predict a supervised token."""
    labels: Tensor = inputs.labels  # type: ignore[assignment]
    num_supervised = sum(inputs.counted(image_token_id=-1).supervised)
    return logits.flatten(0, 1)[true_places(supervised_positions(labels), num_supervised)]


def run_vlm(
    vlm: PreTrainedModel, input_ids: Tensor, images: ModelOutput | None, logits_to_keep: Tensor | int, **arguments: Any
) -> Tensor:
    """Logits of the stock model at the given positions; 0 for all.

    Args:
        arguments: of the model, beside tokens and images.
    """
    model = runner(vlm)
    selects = "logits_to_keep" in inspect.signature(type(model).forward).parameters
    logits = model(
        **inputs_of_forward(vlm, input_ids, images),
        use_cache=False,
        **({"logits_to_keep": logits_to_keep} if selects else {}),
        **arguments,
    ).logits
    return logits if selects or isinstance(logits_to_keep, int) else logits[logits_to_keep]


def check_supervision(num_supervised: int, *all_logits: Tensor | None) -> None:
    """Raise SampleError if pruning removed a token that the labels of the whole batch supervise."""
    for logits in all_logits:
        if logits is not None and len(logits) != num_supervised:
            raise SampleError(
                f"labels supervise {num_supervised} tokens of the batch, but {len(logits)} after pruning; labels of "
                "image placeholders, of padding and of a row's first token must be -100"
            )
