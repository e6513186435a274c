"""Tokenizer of the demo: one token for each word, Vicuna's special tokens, and one token for each fixed sentence.

Sentences that prompts repeat are single tokens, which keeps the tiny model's prompts short.
"""

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from dualspeed.demo.drawing import COLOURS
from dualspeed.demo.questions import LETTER_ANSWER, LETTERS, SHORT_ANSWER

WORDS = (
    *COLOURS,
    *"0123456789",
    *LETTERS,
    *("yes", "no", "is", "are", "there", "a", "in", "the", "image", "what", "colour", "which", "digit", "digits", "of"),
    *("how", "many", "items", "index", "counts"),
    *("?", ".", ":"),
)
SENTENCES = (SHORT_ANSWER, LETTER_ANSWER, "Context: N/A", "Question:", "Options:", "USER:", "ASSISTANT:")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer; ids are <unk> 0, <s> 1, </s> 2, then words, sentences, options, <image> and <pad>."""
    vocabulary = {word: index for index, word in enumerate(("<unk>", "<s>", "</s>", *WORDS))}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = Split(Regex(r"\w+|[^\w\s]"), behavior="removed", invert=True)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    options = [f"({letter})" for letter in LETTERS]
    backend.add_tokens([AddedToken(text, normalized=False) for text in (*SENTENCES, *options)])
    backend.add_special_tokens(["<image>", "<pad>"])
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=2048,
        padding_side="right",
    )
