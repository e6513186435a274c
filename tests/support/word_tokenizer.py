"""Tokenizers of a few tokens for tests and measurements."""

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

LLAVA_TOKENS = {
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "extra_special_tokens": {"image_token": "<image>"},
}


def word_tokenizer(
    tokens: Sequence[str],
    pre_tokenizer: pre_tokenizers.PreTokenizer | None = None,
    adds_bos: bool = False,
    special_tokens: dict[str, Any] = LLAVA_TOKENS,
) -> PreTrainedTokenizerFast:
    """Tokenizer that gives each of `tokens` its index as id; <unk> has to be among them.

    Args:
        pre_tokenizer: splits a text into words; None: at whitespace.
        adds_bos: put <s> in front of a text, as Llama's tokenizer does.
        special_tokens: names of the special tokens, as PreTrainedTokenizerFast takes them.
    """
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        marks = [("<s>", vocabulary["<s>"])]
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=marks)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special_tokens)
