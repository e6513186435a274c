"""How many tokens a sample has, images expanded, and whether it can be cut to max_length: without opening an image.

An image's number of tokens follows from its size, which its report says. Where a processor's own arithmetic differs
from what it does to pixels, samples are measured by their pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
from transformers import ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from dualspeed.batch import IGNORE_INDEX
from dualspeed.data.collator import ConversationCollator
from dualspeed.data.conversations import Problem
from dualspeed.data.images import ImageReport


@dataclass(frozen=True)
class Layout:
    """A sample's token sequence before images are expanded, one entry per token."""

    widths: np.ndarray
    """Positions that a token takes in the model: 1, or an image's number of visual tokens."""
    is_image: np.ndarray
    is_supervised: np.ndarray


Record = dict[str, Any]
Reports = Mapping[str, ImageReport]
LayoutsOf = Callable[[ProcessorMixin, Sequence[Record], Reports], list[Layout | Problem]]


def choose_layouts(processor: ProcessorMixin, sample: Record, reports: Reports) -> LayoutsOf:
    """`layouts_by_size`, many times faster, if it gives this processor's very length of `sample`, which has images."""
    if not hasattr(processor, "_get_num_multimodal_tokens"):
        return layouts_by_pixels
    quick, exact = (layouts(processor, [sample], reports)[0] for layouts in (layouts_by_size, layouts_by_pixels))
    if isinstance(quick, Layout) and isinstance(exact, Layout) and quick.widths.sum() != exact.widths.sum():
        return layouts_by_pixels
    return layouts_by_size


def layouts_by_size(processor: ProcessorMixin, records: Sequence[Record], reports: Reports) -> list[Layout | Problem]:
    """The layout of each record from its images' sizes, each image being one token of the text.

    Follows `ProcessorMixin.apply_chat_template`: the same template, the same rule about the tokenizer's special tokens
    and the same about which tokens a `{% generation %}` block covers.
    """
    paths = list(dict.fromkeys(path for record in records for path in record["images"]))
    num_image_tokens: dict[str, int] = {}
    if paths:
        sizes = [(reports[path].height, reports[path].width) for path in paths]
        counts = processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens
        num_image_tokens = dict(zip(paths, counts, strict=True))
    rendered = [_render(processor, record) for record in records]
    texts = [item[0] for item in rendered if not isinstance(item, Problem)]
    encoded = iter(_encode(processor.tokenizer, texts))
    return [
        item if isinstance(item, Problem) else _layout(processor, *next(encoded), item[1], record, num_image_tokens)
        for item, record in zip(rendered, records, strict=True)
    ]


def _render(processor: ProcessorMixin, record: Record) -> tuple[str, list[tuple[int, int]]] | Problem:
    """(text, supervised spans) of a record."""
    try:
        (text,), (spans,) = render_jinja_template(
            conversations=[record["messages"]],
            chat_template=processor.chat_template,
            return_assistant_tokens_mask=True,
            **processor.tokenizer.special_tokens_map,
        )
    except jinja2.TemplateError as error:
        return _refused(record, error)
    return text, spans


def _encode(tokenizer: Any, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, offsets) of each text, all at once: the tokenizer runs on every core."""
    has_start = [tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token) for text in texts]
    encoded: list[Any] = [None] * len(texts)
    for starts in set(has_start):
        places = [place for place, has in enumerate(has_start) if has == starts]
        batch = tokenizer(
            [texts[place] for place in places], add_special_tokens=not starts, return_offsets_mapping=True
        )
        for place, ids, offsets in zip(places, batch["input_ids"], batch["offset_mapping"], strict=True):
            encoded[place] = np.array(ids), np.array(offsets)
    return encoded


def _layout(
    processor: ProcessorMixin,
    ids: np.ndarray,
    offsets: np.ndarray,
    spans: list[tuple[int, int]],
    record: Record,
    num_image_tokens: Mapping[str, int],
) -> Layout:
    starts, ends = offsets.T
    is_supervised = np.zeros(len(starts), dtype=bool)
    for start, end in spans:
        is_supervised |= (starts < end) & (ends > start)
    is_image = ids == processor.image_token_id
    widths = np.ones(len(starts), dtype=np.int64)
    widths[is_image] = [num_image_tokens[path] for path in record["images"]]
    return Layout(widths, is_image, is_supervised)


def layouts_by_pixels(processor: ProcessorMixin, records: Sequence[Record], reports: Reports) -> list[Layout | Problem]:
    """The layout of each record as the collator makes it, images and all."""
    collator = ConversationCollator(processor)
    layouts: list[Layout | Problem] = []
    for record in records:
        try:
            batch = collator([record])
        except jinja2.TemplateError as error:
            layouts.append(_refused(record, error))
            continue
        ids, labels = batch["input_ids"][0].numpy(), batch["labels"][0].numpy()
        layouts.append(Layout(np.ones_like(ids), ids == processor.image_token_id, labels != IGNORE_INDEX))
    return layouts


def _refused(record: Record, error: jinja2.TemplateError) -> Problem:
    return Problem(record["id"], "", "not for this chat template", str(error))


def fit(record: Record, layout: Layout, max_length: int) -> Problem | tuple[int, bool, int]:
    """(a record's tokens within max_length, whether it is cut there, its image tokens); or why it can't be cut."""
    ends = layout.widths.cumsum()
    length = f"{ends[-1]} tokens, max_length {max_length}"
    if ends[layout.is_image].max(initial=0) > max_length:
        return Problem(record["id"], "", "image tokens beyond max_length", length)
    if not (layout.is_supervised & (ends <= max_length)).any():
        return Problem(record["id"], "", "nothing supervised within max_length", length)
    num_image_tokens = int(layout.widths[layout.is_image].sum())
    return min(int(ends[-1]), max_length), bool(ends[-1] > max_length), num_image_tokens
