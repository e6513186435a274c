"""Words of the user's text that can be about a picture, for MMTok (arXiv 2508.18264, Ironieser/MMTok)."""

import re
from collections.abc import Sequence
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerBase

STOP_WORDS = frozenset(
    """
    a an the
    i you he she it we they
    is are was were be been being
    have has had do does did
    what which who when where why how
    and or but so if then
    at by for from into onto to upon with
    question answer
    """.split()
)
"""Words that the repository leaves out."""
FORMAT_PROMPTS = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)
"""LLaVA's sentences on the form of an answer."""


def keywords(text: str) -> str:
    """The text's words without stop words; the whole text, but for FORMAT_PROMPTS, if none is left."""
    for prompt in FORMAT_PROMPTS:
        text = text.replace(prompt, "")
    return " ".join(word for word in re.findall(r"\w+", text) if word.lower() not in STOP_WORDS) or text.strip()


class KeywordTokenizer:
    """Tokenizer of the `keywords` of texts, which stands in for the tokenizer that it calls."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __call__(self, texts: Sequence[str], **settings: Any) -> BatchEncoding:
        """Tokens of each text's keywords; `settings` are the tokenizer's own."""
        return self.tokenizer([keywords(text) for text in texts], **settings)
