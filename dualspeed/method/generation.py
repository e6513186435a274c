"""Generation on all visual tokens, or on pruned ones behind the mode isolator."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation.utils import GenerateOutput

from dualspeed.batch import TOKEN_INPUTS
from dualspeed.method.fast_mode import encode_batch, prune_batch, pruning_seeds
from dualspeed.method.sequences import Sequences, with_counts
from dualspeed.method.vlm.encoder import accepted_inputs
from dualspeed.method.vlm.entrance import inputs_of_forward, runner
from dualspeed.method.vlm.families import family_of
from dualspeed.method.vlm.inputs import image_inputs, token_inputs
from dualspeed.method.whole_prompt import WholePrompt
from dualspeed.settings.modes import Mode

if TYPE_CHECKING:
    from dualspeed.method.model import DualSpeedModel


@torch.no_grad()
def generate(
    model: "DualSpeedModel",
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    pixel_values: Tensor | None = None,
    image_sizes: Tensor | None = None,
    question_ids: Tensor | None = None,
    mode: Mode = Mode.SLOW,
    **kwargs: Any,
) -> Tensor | GenerateOutput:
    """Generate in one mode; arguments and result are those of `DualSpeedModel.generate`."""
    vlm, mode = model.vlm, Mode(mode)
    attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    named = {"pixel_values": pixel_values, "image_sizes": image_sizes}
    images = {name: values for name, values in named.items() if values is not None}
    if mode is Mode.SLOW or not images:
        return vlm.generate(input_ids=input_ids, attention_mask=attention_mask, **images, **kwargs)
    accepted = accepted_inputs(vlm)
    inputs = {name: kwargs.pop(name) for name in list(kwargs) if name in accepted or name in TOKEN_INPUTS}
    images = image_inputs(vlm, inputs | images)
    full = Sequences(
        input_ids,
        attention_mask,
        labels=None,
        by_token=token_inputs(vlm, input_ids, attention_mask, inputs, images),
        question_ids=question_ids,
    )
    full, images = with_counts(full, vlm.config.image_token_id, images)
    encoded = encode_batch(model, images, full.counted(vlm.config.image_token_id).grids)
    seeds = pruning_seeds(model, encoded, pruning_seed=0)
    pruned, kept = prune_batch(model, full, encoded, seeds, padding_side="left")
    # From given positions (3-D ones in the Qwen-VL families) stock generation counts on after the last of them.
    num_run = pruned.input_ids.shape[1]
    # Embeddings have no ids to return.
    prompt = WholePrompt(input_ids, num_run, num_returned=0 if family_of(vlm).enters_as_embeddings else num_run)
    output = runner(vlm).generate(
        attention_mask=pruned.attention_mask,
        **inputs_of_forward(vlm, pruned.input_ids, kept),
        **pruned.by_token,
        **prompt.arguments(kwargs, runner(vlm).generation_config),
    )
    return prompt.result(output)
