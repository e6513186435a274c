"""Lengths of samples in tokens, images expanded, and truncation to max_length, without opening images.

The number of an image's tokens follows from its size, which is in its report. Processors whose own arithmetic disagrees
with their output are measured by that output, image by image.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from transformers import ProcessorMixin

from dualspeed.batch import IGNORE_INDEX
from dualspeed.data.collator import ConversationCollator
from dualspeed.data.conversations import Problem
from dualspeed.data.images import ImageReport
from dualspeed.data.supervision import Rendered, Supervision, image_token_ids
from dualspeed.errors import SupervisionError


@dataclass(frozen=True)
class SampleTokens:
    """Token sequence of a sample; arrays with one entry per token, (L,)."""

    widths: np.ndarray
    """Positions of a token in the model: 1, or the number of visual tokens of an image that isn't expanded yet."""
    is_image: np.ndarray
    """True for image tokens."""
    is_supervised: np.ndarray
    """True for tokens of answers (dualspeed.data.supervision)."""


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
    (exact,) = tokens_by_pixels(processor, [sample], reports)
    if isinstance(exact, Problem):
        return tokens_by_size
    if not _has_one_token_per_image(processor, sample):
        return tokens_by_pixels
    (quick,) = tokens_by_size(processor, [sample], reports)
    return tokens_by_size if _totals(quick) == _totals(exact) else tokens_by_pixels


def _totals(tokens: SampleTokens | Problem) -> tuple[int, int] | None:
    """Positions in the model, and those of images among them."""
    return None if isinstance(tokens, Problem) else (tokens.widths.sum(), tokens.widths[tokens.is_image].sum())


def tokens_by_size(
    processor: ProcessorMixin, records: Sequence[Record], reports: Reports
) -> list[SampleTokens | Problem]:
    """Return the tokens of each record from the sizes of its images; each image is one token.

    Follows `ProcessorMixin.apply_chat_template`: the same text, the same rule for the tokenizer's special tokens, and
    the same choice of tokens for a supervised stretch of text.
    """
    paths = list(dict.fromkeys(path for record in records for path in record["images"]))
    num_image_tokens: dict[str, int] = {}
    if paths:
        sizes = [(reports[path].height, reports[path].width) for path in paths]
        counts = processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens
        num_image_tokens = dict(zip(paths, counts, strict=True))
    supervision = Supervision.of(processor)
    rendered = [_render(supervision, record) for record in records]
    texts = [item.text for item in rendered if not isinstance(item, Problem)]
    encoded = iter(_encode(processor.tokenizer, texts))
    return [
        item if isinstance(item, Problem) else _tokens(processor, *next(encoded), item.spans, record, num_image_tokens)
        for item, record in zip(rendered, records, strict=True)
    ]


def _has_one_token_per_image(processor: ProcessorMixin, sample: Record) -> bool:
    """True if an image's place in the text is one image token, as `tokens_by_size` takes it."""
    ids = processor.tokenizer(Supervision.of(processor).render(sample["messages"]).text)["input_ids"]
    return ids.count(processor.image_token_id) == len(sample["images"])


def _render(supervision: Supervision, record: Record) -> Rendered | Problem:
    try:
        return supervision.render(record["messages"])
    except SupervisionError as error:
        return Problem(record["id"], "", "not for this chat template", str(error))


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
    is_supervised &= ~is_image
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
        if isinstance(refused := _render(collator.supervision, record), Problem):
            tokens.append(refused)
            continue
        batch = collator([record])
        ids, labels = batch["input_ids"][0].numpy(), batch["labels"][0].numpy()
        is_image = np.isin(ids, image_token_ids(processor))
        tokens.append(SampleTokens(np.ones_like(ids), is_image, labels != IGNORE_INDEX))
    return tokens


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
