"""Collator: rows of a prepared dataset become one batch of pixels, padded tokens and labels.

Input: rows {id, messages, images}. Output: input_ids, attention_mask and labels (B, L), in which each image's
placeholder is expanded to its number of visual tokens; pixel_values (and image_sizes for any-resolution processors)
with one entry per image, in the order of the rows. Batches without images have neither.

Supervised are the answers, in the processor's own chat template (dualspeed.data.supervision). The processor does all
the work except truncation, since a tokenizer would cut inside an image, and the conversion to tensors, which is faster
row by row than the processor's own.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin

from dualspeed.batch import IGNORE_INDEX, TOKEN_INPUTS, TOWER_STATES
from dualspeed.data.conversations import Problem
from dualspeed.data.images import ImageSource, open_image
from dualspeed.data.pixels import byte_output, normalized_pixels
from dualspeed.data.questions import text_of_user, tokenize_questions
from dualspeed.data.rows import read_row
from dualspeed.data.supervision import (
    PROCESSORS_CHOICE,
    Supervision,
    image_token_ids,
    own_template,
    prompt_settings,
)
from dualspeed.errors import SampleError
from dualspeed.settings.families import TABLE_PROCESSORS

PADDING_SIDES = ("left", "right")


class ConversationCollator:
    """Collator that makes training batches of conversations.

    Args:
        processor: Hugging Face processor with a chat template.
        max_length: longest row in tokens; longer rows are truncated at their end, on either padding side. None: no
            truncation. A row that would lose image tokens is an error.
        padding_side: "right" or "left".
        with_num_images: True to add `num_images`, a list of each row's number of images.
        question_tokenizer: tokenizer for `question_ids`, the user's turns, which query-based pruners need
            (`DualSpeedModel.question_tokenizer`); None: no `question_ids`.
        positions: function of input_ids, attention_mask and the batch that gives `positions_3d` (B, 3, L), the
            positions in time, height and width of the Qwen-VL families (`DualSpeedModel.positions`). A collator is the
            place for them, since a model on an accelerator would wait for each of their numbers. None: none.
        tower_states: function of the batch's images, in reading order, that gives `tower_states`, what is kept of a
            frozen vision tower's pass over them (dualspeed.training.stored_features). None: the tower runs.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        max_length: int | None = None,
        padding_side: str = "right",
        with_num_images: bool = False,
        question_tokenizer: Callable[..., Mapping] | None = None,
        positions: Callable[[torch.Tensor, torch.Tensor, Mapping[str, torch.Tensor]], torch.Tensor] | None = None,
        tower_states: Callable[[Sequence[ImageSource]], Any] | None = None,
    ) -> None:
        check_padding_side(padding_side)
        self.processor = processor
        self.supervision = Supervision.of(processor)
        self.max_length = max_length
        self.padding_side = padding_side
        self.with_num_images = with_num_images
        self.question_tokenizer = question_tokenizer
        self.positions = positions
        self.tower_states = tower_states

    def __call__(self, examples: Sequence[dict[str, Any]]) -> BatchFeature:
        """Return the batch of `examples`, rows in any format; errors name a sample by its id."""
        examples = [record_of(example, number) for number, example in enumerate(examples, start=1)]
        encoded = self.supervision.encode(
            [messages_with_images(example) for example in examples],
            names=[example["id"] for example in examples],
            **byte_output(self.processor),
            **tensors_of_images(self.processor),
        )
        if byte_output(self.processor) and "pixel_values" in encoded:
            encoded["pixel_values"] = normalized_pixels(self.processor, encoded["pixel_values"])
        self._check_lengths(examples, encoded["input_ids"])
        rows = [np.array(row[: self.max_length]) for row in encoded["input_ids"]]
        masks = [np.array(mask[: self.max_length], dtype=bool) for mask in encoded.pop("assistant_masks")]
        labels = [np.where(mask, row, IGNORE_INDEX) for row, mask in zip(rows, masks, strict=True)]
        batch = padded_batch(rows, encoded, padding_token(self.processor), self.padding_side)
        batch["labels"] = pad(labels, IGNORE_INDEX, self.padding_side)
        if self.with_num_images:
            batch["num_images"] = [len(example["images"]) for example in examples]
        if self.question_tokenizer is not None:
            questions = [text_of_user(example["messages"]) for example in examples]
            batch["question_ids"] = tokenize_questions(questions, self.question_tokenizer)
        if self.positions is not None and "pixel_values" in batch:
            batch["positions_3d"] = self.positions(batch["input_ids"], batch["attention_mask"], batch)
        if self.tower_states is not None:
            batch[TOWER_STATES] = self.tower_states([source for example in examples for source in example["images"]])
        return batch

    def _check_lengths(self, examples: Sequence[dict[str, Any]], rows: list[list[int]]) -> None:
        """Raise SampleError if truncating a row to max_length would cut image tokens."""
        image_ids = set(image_token_ids(self.processor))
        for example, row in zip(examples, rows, strict=True):
            if self.max_length and not image_ids.isdisjoint(row[self.max_length :]):
                raise SampleError(
                    f"sample {example['id']!r}: max_length {self.max_length} would cut image tokens (the sample has "
                    f"{len(row)} tokens); `dualspeed prepare` drops such samples, a larger max_length keeps them"
                )


def generation_inputs(
    processor: ProcessorMixin,
    examples: Sequence[dict[str, Any]],
    padding_side: str = "left",
    question_tokenizer: Callable[..., Mapping] | None = None,
) -> BatchFeature:
    """Return the model inputs of questions {image: path or None, prompt}; the prompt ends where the answer begins.

    Returns:
        input_ids and attention_mask (B, L); pixel_values (and image_sizes) if there are images; question_ids (B, Q) if
        there is a `question_tokenizer`.
    """
    check_padding_side(padding_side)
    conversations = [[{"role": "user", "content": question_content(example)}] for example in examples]
    encoded = processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors=PROCESSORS_CHOICE,
        processor_kwargs={"padding": False, **tensors_of_images(processor)},
        **prompt_settings(own_template(processor)),
    )
    rows = [np.array(row) for row in encoded["input_ids"]]
    batch = padded_batch(rows, encoded, padding_token(processor), padding_side)
    if question_tokenizer is not None:
        batch["question_ids"] = tokenize_questions([example["prompt"] for example in examples], question_tokenizer)
    return batch


def question_content(example: dict[str, Any]) -> list[dict[str, Any]]:
    """Content of a user turn: the opened image if there is one, then the prompt."""
    text = {"type": "text", "text": example["prompt"]}
    if example["image"] is None:
        return [text]
    return [{"type": "image", "image": open_image(example["image"])}, text]


def record_of(example: dict[str, Any], number: int) -> dict[str, Any]:
    """Record {id, messages, images} of a row in any format, the `number`-th of its batch; SampleError says why not."""
    if is_record(example):
        return example
    record = read_row(example, f"row {number} of the batch")
    if isinstance(record, Problem):
        raise SampleError(f"sample {record.id!r}: {record.reason} ({record.detail})")
    return record


def is_record(example: Mapping[str, Any]) -> bool:
    """True for a row that is a record already, as prepared data are; one whose images have no places yet is none."""
    if not isinstance(example.get("images"), list) or not isinstance(example.get("messages"), list):
        return False
    contents = [message.get("content") for message in example["messages"]]
    if "id" not in example or not all(isinstance(content, list) for content in contents):
        return False
    types = [item.get("type") for content in contents for item in content]
    return {"text", "image"}.issuperset(types) and ("image" in types or not example["images"])


def messages_with_images(example: dict[str, Any]) -> list[dict[str, Any]]:
    """Messages of a row with its opened images in place; SampleError if placeholders and images differ in number."""
    paths = iter(example["images"])
    num_placeholders = sum(item["type"] == "image" for message in example["messages"] for item in message["content"])
    if num_placeholders != len(example["images"]):
        raise SampleError(
            f"sample {example['id']!r}: {num_placeholders} image placeholders, but {len(example['images'])} images"
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


def tensors_of_images(processor: ProcessorMixin) -> dict[str, Any]:
    """Arguments that make the image processor return tensors, and it alone: rows of tokens differ in length.

    Those with one array an image are faster without, and need none.
    """
    is_known = type(processor.image_processor).__name__ in TABLE_PROCESSORS
    return {} if is_known else {"images_kwargs": {"return_tensors": "pt"}}


def padding_token(processor: ProcessorMixin) -> int:
    """Token that pads rows; where a tokenizer has none, the end of sequence: the attention mask decides."""
    tokenizer = processor.tokenizer
    token = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if token is None:
        raise SampleError(
            f"the {type(tokenizer).__name__} has neither a padding token nor one that ends a sequence; valid: "
            "a tokenizer with `pad_token` set"
        )
    return token


def padded_batch(rows: list[np.ndarray], encoded: BatchFeature, pad_token_id: int, padding_side: str) -> BatchFeature:
    """Padded input_ids, attention_mask and token types (B, L) of `rows`, and the images of `encoded`, as tensors."""
    batch = BatchFeature({"input_ids": pad(rows, pad_token_id, padding_side)})
    batch["attention_mask"] = pad([np.ones_like(row) for row in rows], 0, padding_side)
    for key in encoded.keys() - {"input_ids", "attention_mask"}:
        values = encoded[key]
        if key in TOKEN_INPUTS:
            types = [np.array(of_row[: len(row)]) for of_row, row in zip(values, rows, strict=True)]
            batch[key] = pad(types, 0, padding_side)
            continue
        batch[key] = values if isinstance(values, torch.Tensor) else torch.from_numpy(np.stack(values))
    return batch


def pad(rows: list[np.ndarray], value: int, side: str) -> torch.Tensor:
    """Pad rows of different lengths with `value` to the longest: (B, L) int64."""
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
