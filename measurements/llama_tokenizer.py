"""Llama-like tokenizer, trained on given text: BPE over characters, blanks as ▁, unknown characters as bytes.

Like Llama's own (transformers' `LlamaTokenizer` files) it puts ▁ before each piece of text between special tokens, and
<s> at the start. It stands in for Vicuna's tokenizer, which the tests don't have.
"""

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
ADDED_TOKENS = ("<image>", "<pad>")


def train_llama_tokenizer(lines: Iterable[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer with merges from `lines`; its 256 byte tokens are in addition to `vocabulary_size`."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = llama_normalizer()
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # no token contains an inner blank
    trainer = trainers.BpeTrainer(vocab_size=vocabulary_size, min_frequency=1, show_progress=False)
    trained.train_from_iterator(lines, trainer)
    model = json.loads(trained.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    vocabulary = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    backend = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(vocabulary)},
            merges=[tuple(merge) for merge in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = llama_normalizer()
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )


def llama_normalizer() -> normalizers.Normalizer:
    """Normalizer that replaces blanks by ▁ and puts one at the start."""
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
