"""Rotary positions in time, height and width of the Qwen-VL families, which the collator computes on the host.

transformers computes them image by image, with a host-device sync for each of their numbers.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from dualspeed.method.vlm.families import family_of, is_listed


class Positions3D:
    """Computation of a batch's positions by the model's own code, without its weights; it can go to another process."""

    def __init__(self, vlm: PreTrainedModel) -> None:
        # The class of the model with nothing but its configuration, which is all that the positions depend on.
        model_class: Any = type(vlm.model)
        self.model = model_class.__new__(model_class)
        nn.Module.__init__(self.model)
        self.model.config = vlm.model.config
        self.model.rope_deltas = None
        self.image_token_id: int = vlm.config.image_token_id

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, images: Mapping[str, Tensor]) -> Tensor:
        """(B, 3, L) positions in time, height and width.

        Args:
            input_ids, attention_mask: (B, L) the batch with all of its tokens.
            images: inputs of the vision tower, `image_grid_thw` among them.
        """
        return positions_3d(self.model, self.image_token_id, input_ids, attention_mask, images)


def make_positions(vlm: PreTrainedModel) -> Positions3D | None:
    """Function for the collator that computes a batch's positions; None for families without such."""
    return Positions3D(vlm) if is_listed(vlm) and family_of(vlm).has_3d_positions else None


def positions_3d(
    model: Any, image_token_id: int, input_ids: Tensor, attention_mask: Tensor, images: Mapping[str, Tensor]
) -> Tensor:
    """(B, 3, L) positions by `model`, the part of a VLM that computes them; other arguments as for Positions3D."""
    given = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "mm_token_type_ids": (input_ids == image_token_id).int(),
        **images,
    }
    accepted = inspect.signature(model.compute_3d_position_ids).parameters
    return model.compute_3d_position_ids(**{name: given.get(name) for name in accepted}).transpose(0, 1)
