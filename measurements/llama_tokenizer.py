"""A tokenizer of Llama's kind, trained on the spot: BPE over characters, blanks as ▁, unknown characters as bytes.

Like Llama's own (transformers' `LlamaTokenizer` files) it puts ▁ before each stretch of text between special tokens,
and <s> in front. Vicuna's own tokenizer was not available to the tests; its kind is this one's.
"""

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
ADDED_TOKENS = ("<image>", "<pad>")


def train_llama_tokenizer(lines: Iterable[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose merges come from `lines`; the 256 bytes come on top of `vocabulary_size`."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = llama_normalizer()
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # no piece reaches over a blank
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
    """Blanks become ▁, and one stands in front."""
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
