"""Lengths of samples in tokens, images expanded, and truncation to max_length, without opening images.

The number of an image's tokens follows from its size, which is in its report. Processors whose own arithmetic disagrees
with their output are measured by that output, image by image.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jinja2
import numpy as np
from transformers import ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from dualspeed.batch import IGNORE_INDEX
from dualspeed.data.collator import ConversationCollator
from dualspeed.data.conversations import Problem
from dualspeed.data.images import ImageReport


@dataclass(frozen=True)
class SampleTokens:
    """Token sequence of a sample; arrays with one entry per token, (L,)."""

    widths: np.ndarray
    """Positions of a token in the model: 1, or the number of visual tokens of an image that isn't expanded yet."""
    is_image: np.ndarray
    """True for image tokens."""
    is_supervised: np.ndarray
    """True for tokens in `{% generation %}` blocks."""


class TruncatedLength(NamedTuple):
    """Length of a sample after truncation to max_length."""

    num_tokens: int
    is_cut: bool
    """True if the sample was longer."""
    num_image_tokens: int


Record = dict[str, Any]
Reports = Mapping[str, ImageReport]
TokensOf = Callable[[ProcessorMixin, Sequence[Record], Reports], list[SampleTokens | Problem]]
"""Function (processor, records, reports of their images) -> token sequence of each record."""


def choose_method(processor: ProcessorMixin, sample: Record, reports: Reports) -> TokensOf:
    """Return `tokens_by_size`, which is many times faster, if it agrees with `tokens_by_pixels` on `sample`.

    Args:
        sample: a record with images.
    """
    if not hasattr(processor, "_get_num_multimodal_tokens"):
        return tokens_by_pixels
    quick, exact = (tokens_of(processor, [sample], reports)[0] for tokens_of in (tokens_by_size, tokens_by_pixels))
    if isinstance(quick, SampleTokens) and isinstance(exact, SampleTokens) and quick.widths.sum() != exact.widths.sum():
        return tokens_by_pixels
    return tokens_by_size


def tokens_by_size(
    processor: ProcessorMixin, records: Sequence[Record], reports: Reports
) -> list[SampleTokens | Problem]:
    """Return the tokens of each record from the sizes of its images; each image is one token.

    Follows `ProcessorMixin.apply_chat_template`: the same template, the same rule for the tokenizer's special tokens,
    and the same choice of tokens for a `{% generation %}` block.
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
        item if isinstance(item, Problem) else _tokens(processor, *next(encoded), item[1], record, num_image_tokens)
        for item, record in zip(rendered, records, strict=True)
    ]


def _render(processor: ProcessorMixin, record: Record) -> tuple[str, list[tuple[int, int]]] | Problem:
    """Return (text, supervised spans) of a record, in characters."""
    try:
        (text,), (spans,) = render_jinja_template(
            conversations=[record["messages"]],
            chat_template=processor.chat_template,
            return_assistant_tokens_mask=True,
            **processor.tokenizer.special_tokens_map,
        )
    except jinja2.TemplateError as error:
        return _template_problem(record, error)
    return text, spans


def _encode(tokenizer: Any, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (ids, offsets) of each text, tokenized in one call, which runs on all cores."""
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


def _tokens(
    processor: ProcessorMixin,
    ids: np.ndarray,
    offsets: np.ndarray,
    spans: list[tuple[int, int]],
    record: Record,
    num_image_tokens: Mapping[str, int],
) -> SampleTokens:
    starts, ends = offsets.T
    is_supervised = np.zeros(len(starts), dtype=bool)
    for start, end in spans:
        is_supervised |= (starts < end) & (ends > start)
    is_image = ids == processor.image_token_id
    widths = np.ones(len(starts), dtype=np.int64)
    widths[is_image] = [num_image_tokens[path] for path in record["images"]]
    return SampleTokens(widths, is_image, is_supervised)


def tokens_by_pixels(
    processor: ProcessorMixin, records: Sequence[Record], reports: Reports
) -> list[SampleTokens | Problem]:
    """Return the tokens of each record as the collator makes them from its opened images, images expanded."""
    collator = ConversationCollator(processor)
    tokens: list[SampleTokens | Problem] = []
    for record in records:
        try:
            batch = collator([record])
        except jinja2.TemplateError as error:
            tokens.append(_template_problem(record, error))
            continue
        ids, labels = batch["input_ids"][0].numpy(), batch["labels"][0].numpy()
        tokens.append(SampleTokens(np.ones_like(ids), ids == processor.image_token_id, labels != IGNORE_INDEX))
    return tokens


def _template_problem(record: Record, error: jinja2.TemplateError) -> Problem:
    return Problem(record["id"], "", "not for this chat template", str(error))


def truncated_length(record: Record, tokens: SampleTokens, max_length: int) -> TruncatedLength | Problem:
    """Return the length of a record truncated to max_length, or the problem that makes it unusable."""
    ends = tokens.widths.cumsum()
    length = f"{ends[-1]} tokens, max_length {max_length}"
    if ends[tokens.is_image].max(initial=0) > max_length:
        return Problem(record["id"], "", "image tokens beyond max_length", length)
    if not (tokens.is_supervised & (ends <= max_length)).any():
        return Problem(record["id"], "", "nothing supervised within max_length", length)
    num_image_tokens = int(tokens.widths[tokens.is_image].sum())
    return TruncatedLength(min(int(ends[-1]), max_length), bool(ends[-1] > max_length), num_image_tokens)
