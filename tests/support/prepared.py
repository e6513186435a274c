"""Batches of every family from our collator, without the families' processors, some of which need torchvision."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from transformers import BatchFeature

from dualspeed.batch import TOKEN_INPUTS
from dualspeed.data.collator import ConversationCollator
from dualspeed.method.model import DualSpeedModel
from tests.support.families import IMAGE, PAD, Family, batch


class PreparedProcessor:
    """All that ConversationCollator asks of a processor; the samples are those of `tests.support.families.batch`."""

    chat_template = "{% generation %}answer{% endgeneration %}"
    image_processor = None
    image_token_id = IMAGE
    pad_token_id = PAD
    special_tokens_map: ClassVar[dict[str, str]] = {}

    def __init__(self, family: Family, num_images: list[int], seed: int = 0) -> None:
        self.prepared = batch(family, num_images, seed=seed)

    @property
    def tokenizer(self) -> "PreparedProcessor":
        """The processor itself, which has all that is asked of a tokenizer."""
        return self

    def get_added_vocab(self) -> dict[str, int]:
        """No special tokens."""
        return {}

    def apply_chat_template(self, conversations: list[Any], **settings: Any) -> BatchFeature:
        """Unpadded rows of tokens, in lists, and the inputs of the vision tower."""
        is_token = self.prepared["attention_mask"].bool()

        def rows(values: torch.Tensor) -> list[list[int]]:
            return [row[mask].tolist() for row, mask in zip(values, is_token, strict=True)]

        encoded = {name: values for name, values in self.prepared.items() if name not in ("labels", "attention_mask")}
        encoded |= {name: rows(encoded[name]) for name in ("input_ids", *TOKEN_INPUTS) if name in encoded}
        return BatchFeature(encoded | {"assistant_masks": rows((self.prepared["labels"] != -100).long())})


def collated(
    family: Family, model: DualSpeedModel, num_images: Sequence[int], padding_side: str = "right", **settings: Any
) -> BatchFeature:
    """Batch of `num_images` from the collator, with all that it adds for `model`."""
    collator = ConversationCollator(
        PreparedProcessor(family, list(num_images)),
        padding_side=padding_side,
        positions=model.positions(),
        **settings,
    )
    made = collator([{"id": str(index), "messages": [], "images": []} for index in range(len(num_images))])
    made["num_images"] = list(num_images)  # the collator counts the pictures' files, which there are none of
    return made
