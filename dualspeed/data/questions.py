"""User questions as tokens, `question_ids`: input of query-based pruners beside the prompt."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dualspeed.batch import QUESTION_PADDING


def text_of_user(messages: Sequence[dict[str, Any]]) -> str:
    """Text of all user turns of a conversation, one turn a line, without system prompt and answers."""
    items = [item for message in messages if message["role"] == "user" for item in message["content"]]
    return "\n".join(item["text"] for item in items if item["type"] == "text")


def tokenize_questions(texts: Sequence[str], tokenizer: Callable[..., Mapping]) -> Tensor:
    """Tokenize texts without special tokens: (B, Q), shorter texts padded on the right with QUESTION_PADDING."""
    rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    rows = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(rows, batch_first=True, padding_value=QUESTION_PADDING)
