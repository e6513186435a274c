"""Rows of a prepared dataset become one batch: pixels, padded tokens and labels.

Enters: rows {id, messages, images}. Leaves: input_ids, attention_mask and labels (B, L), where each image's placeholder
is expanded to its number of visual tokens; pixel_values (and image_sizes for LLaVA-NeXT) with one entry per image, rows
one after another, and neither key when the batch has no image.

What is supervised comes from the `{% generation %}` blocks of the processor's own chat template. Everything here is the
processor's work but two things: cutting long rows, where a tokenizer would cut through images, and making tensors,
which is faster row by row than the processor's own conversion.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from dualspeed.batch import IGNORE_INDEX
from dualspeed.data.images import open_image
from dualspeed.data.pixels import leaves_bytes, pixel_values
from dualspeed.data.questions import text_of_user, tokenize_questions
from dualspeed.errors import SampleError

PADDING_SIDES = ("left", "right")


class ConversationCollator:
    """Makes training batches of conversations.

    Args:
        processor: a Hugging Face processor whose chat template marks its answers with `{% generation %}` blocks.
        max_length: longer rows are cut at their end, whichever side is padded; None cuts nothing. Image tokens are
            never cut: a row that would need it is an error.
        padding_side: "right" or "left".
        with_num_images: whether a batch says how many images each row has, in a list `num_images`.
        question_tokenizer: adds `question_ids`, the user's turns by this tokenizer, for pruners that go by them
            (`DualSpeedModel.question_tokenizer`).
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        max_length: int | None = None,
        padding_side: str = "right",
        with_num_images: bool = False,
        question_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        check_padding_side(padding_side)
        check_template(processor)
        self.processor = processor
        self.max_length = max_length
        self.padding_side = padding_side
        self.with_num_images = with_num_images
        self.question_tokenizer = question_tokenizer

    def __call__(self, examples: Sequence[dict[str, Any]]) -> BatchFeature:
        """Batch of `examples`; errors name the sample by its id."""
        conversations = [conversation_with_pictures(example) for example in examples]
        encoded = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            processor_kwargs=leaves_bytes(self.processor),
        )
        if leaves_bytes(self.processor) and "pixel_values" in encoded:
            encoded["pixel_values"] = pixel_values(self.processor, encoded["pixel_values"])
        self._check_lengths(examples, encoded["input_ids"])
        rows = [np.array(row[: self.max_length]) for row in encoded["input_ids"]]
        masks = [np.array(mask[: self.max_length], dtype=bool) for mask in encoded.pop("assistant_masks")]
        labels = [np.where(mask, row, IGNORE_INDEX) for row, mask in zip(rows, masks, strict=True)]
        batch = batch_of(rows, encoded, self.processor.tokenizer.pad_token_id, self.padding_side)
        batch["labels"] = pad(labels, IGNORE_INDEX, self.padding_side)
        if self.with_num_images:
            batch["num_images"] = [len(example["images"]) for example in examples]
        if self.question_tokenizer is not None:
            questions = [text_of_user(example["messages"]) for example in examples]
            batch["question_ids"] = tokenize_questions(questions, self.question_tokenizer)
        return batch

    def _check_lengths(self, examples: Sequence[dict[str, Any]], rows: list[list[int]]) -> None:
        """Raise SampleError if cutting a row to max_length would cut image tokens."""
        for example, row in zip(examples, rows, strict=True):
            if self.max_length and self.processor.image_token_id in row[self.max_length :]:
                raise SampleError(
                    f"sample {example['id']!r}: max_length {self.max_length} would cut image tokens (the sample has "
                    f"{len(row)} tokens); `dualspeed prepare` drops such samples, a larger max_length keeps them"
                )


def generation_inputs(
    processor: ProcessorMixin,
    examples: Sequence[dict[str, Any]],
    padding_side: str = "left",
    question_tokenizer: PreTrainedTokenizerBase | None = None,
) -> BatchFeature:
    """Model inputs for questions {image: path or None, prompt}, up to where the answer begins.

    Returns input_ids and attention_mask (B, L), and the images' pixel_values (and image_sizes) if there are images.
    """
    check_padding_side(padding_side)
    conversations = [[{"role": "user", "content": question_content(example)}] for example in examples]
    encoded = processor.apply_chat_template(conversations, add_generation_prompt=True, tokenize=True, return_dict=True)
    rows = [np.array(row) for row in encoded["input_ids"]]
    batch = batch_of(rows, encoded, processor.tokenizer.pad_token_id, padding_side)
    if question_tokenizer is not None:
        batch["question_ids"] = tokenize_questions([example["prompt"] for example in examples], question_tokenizer)
    return batch


def question_content(example: dict[str, Any]) -> list[dict[str, Any]]:
    """Content of a user turn: the opened image, if any, then the prompt."""
    text = {"type": "text", "text": example["prompt"]}
    if example["image"] is None:
        return [text]
    return [{"type": "image", "image": open_image(example["image"])}, text]


def conversation_with_pictures(example: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of a row with its opened images in their places; ValueError if their numbers differ."""
    paths = iter(example["images"])
    num_places = sum(item["type"] == "image" for message in example["messages"] for item in message["content"])
    if num_places != len(example["images"]):
        raise SampleError(
            f"sample {example['id']!r}: {num_places} places for images, but {len(example['images'])} images"
        )
    return [
        {
            "role": message["role"],
            "content": [
                {"type": "image", "image": open_image(next(paths))} if item["type"] == "image" else item
                for item in message["content"]
            ],
        }
        for message in example["messages"]
    ]


def batch_of(rows: list[np.ndarray], encoded: BatchFeature, pad_token_id: int, padding_side: str) -> BatchFeature:
    """Padded input_ids and attention_mask of `rows`, and what `encoded` holds of the images, as tensors."""
    batch = BatchFeature({"input_ids": pad(rows, pad_token_id, padding_side)})
    batch["attention_mask"] = pad([np.ones_like(row) for row in rows], 0, padding_side)
    for key in encoded.keys() - {"input_ids", "attention_mask"}:
        values = encoded[key]
        batch[key] = values if isinstance(values, torch.Tensor) else torch.from_numpy(np.stack(values))
    return batch


def pad(rows: list[np.ndarray], value: int, side: str) -> torch.Tensor:
    """(B, L) int64: rows of different lengths, filled up with `value` to the longest."""
    length = max(len(row) for row in rows)
    padded = np.full((len(rows), length), value, dtype=np.int64)
    for target, row in zip(padded, rows, strict=True):
        if side == "right":
            target[: len(row)] = row
        else:
            target[length - len(row) :] = row
    return torch.from_numpy(padded)


def check_padding_side(side: str) -> None:
    """Raise SampleError unless `side` is one of PADDING_SIDES."""
    if side not in PADDING_SIDES:
        raise SampleError(f"padding_side {side!r} is unknown; valid: {', '.join(PADDING_SIDES)}")


def check_template(processor: ProcessorMixin) -> None:
    """Raise SampleError unless the processor's chat template says what is supervised."""
    if not re.search(r"\{%-?\s*generation\b", str(processor.chat_template)):
        raise SampleError(
            "the processor's chat template has no {% generation %} block, so nothing would be supervised; "
            "dualspeed.chat_templates.use_template(processor, name) sets one that has"
        )
