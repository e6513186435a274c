"""Prompts and labels token by token, as LLaVA's own code makes them, with a Llama-like tokenizer.

Each expectation is written by hand from LLaVA's rules: tokens in order, prompts and supervised answers as separate
strings. The tests don't have Vicuna's tokenizer; this one is trained on a few lines, with the same normalizer, byte
fallback and special tokens.
"""

import pytest
from PIL import Image

from dualspeed.chat_templates import use_template
from dualspeed.data.collator import ConversationCollator
from measurements.llama_tokenizer import train_llama_tokenizer
from tests.support import tiny
from tests.support.samples import entry, load

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LINES = [SYSTEM, "USER: What is this? ASSISTANT: It is a red cat.", "USER: Is it old? ASSISTANT: No, it is new."]


@pytest.fixture(scope="module")
def tokenizer():
    return train_llama_tokenizer(LINES * 10, 2000)


def encoded(tokenizer, template, *texts, num_images, folder):
    """Return [(tokens, is_supervised)] of a conversation: neighbours of one kind joined, an image's tokens as one."""
    Image.new("RGB", (28, 28)).save(folder / "a.png")
    image = {"image": ["a.png"] * num_images} if num_images else {}
    (record,), _ = load(folder, [entry(*texts, **image)], folder)
    processor = tiny.llava_processor()
    processor.tokenizer, processor.image_token_id = tokenizer, tokenizer.convert_tokens_to_ids("<image>")
    use_template(processor, template)
    batch = ConversationCollator(processor)([record])
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    stretches = []
    for piece, label in zip(tokenizer.convert_ids_to_tokens(ids), labels, strict=True):
        supervised = label.item() != -100
        if not stretches or stretches[-1][1] != supervised:
            stretches.append(([], supervised))
        if not (piece == "<image>" and stretches[-1][0][-1:] == ["<image>"]):
            stretches[-1][0].append(piece)
    return [(" ".join(pieces), supervised) for pieces, supervised in stretches]


SYSTEM_PIECES = (
    "<s> ▁A ▁chat ▁between ▁a ▁curious ▁user ▁and ▁an ▁artificial ▁intelligence ▁assistant. ▁The ▁assistant ▁gives "
    "▁helpful, ▁detailed, ▁and ▁polite ▁answers ▁to ▁the ▁user's ▁questions. "
)
CAT = "▁It ▁is ▁a ▁red ▁cat. </s>"
NO = "▁No, ▁it ▁is ▁new. </s>"

# Texts of the turns, number of images, then the tokens of prompt, answer, prompt, answer ...
VICUNA = {
    "one turn": (
        ("<image>\nWhat is this?", "It is a red cat."),
        1,
        (SYSTEM_PIECES + "▁USER: ▁ <image> ▁ <0x0A> What ▁is ▁this? ▁ASSISTANT:", CAT),
    ),
    "several turns": (
        ("<image>\nWhat is this?", "It is a red cat.", "Is it old?", "No, it is new."),
        1,
        (
            SYSTEM_PIECES + "▁USER: ▁ <image> ▁ <0x0A> What ▁is ▁this? ▁ASSISTANT:",
            CAT,
            "▁USER: ▁Is ▁it ▁old? ▁ASSISTANT:",
            NO,
        ),
    ),
    "text only": (
        ("What is this?", "It is a red cat."),
        0,
        (SYSTEM_PIECES + "▁USER: ▁What ▁is ▁this? ▁ASSISTANT:", CAT),
    ),
    "image at the end": (
        ("What is this?\n<image>", "It is a red cat."),
        1,
        (SYSTEM_PIECES + "▁USER: ▁ <image> ▁ <0x0A> What ▁is ▁this? ▁ASSISTANT:", CAT),
    ),
    "image in a later turn": (
        ("What is this?", "It is a red cat.", "Is it old? <image>", "No, it is new."),
        1,
        (
            SYSTEM_PIECES + "▁USER: ▁What ▁is ▁this? ▁ASSISTANT:",
            CAT,
            "▁USER: ▁ <image> ▁ <0x0A> I s ▁it ▁old? ▁ASSISTANT:",
            NO,
        ),
    ),
    "unusual whitespace": (
        ("  What  is\tthis? ", "It is \n\na red cat. "),
        0,
        (
            SYSTEM_PIECES + "▁USER: ▁ ▁ ▁What ▁ ▁is <0x09> t his ? ▁ ▁ASSISTANT:",
            "▁It ▁is ▁ <0x0A> <0x0A> a ▁red ▁cat. ▁ </s>",
        ),
    ),
    "blanks around an image": (
        (" \n<image>  \n What is this? \n", "It is a red cat."),
        1,
        (SYSTEM_PIECES + "▁USER: ▁ <image> ▁ <0x0A> What ▁is ▁this? ▁ASSISTANT:", CAT),
    ),
    "unicode": (
        ("<image>\nÉ 猫?", "猫 🐈."),
        1,
        (
            SYSTEM_PIECES + "▁USER: ▁ <image> ▁ <0x0A> <0xC3> <0x89> ▁ <0xE7> <0x8C> <0xAB> ? ▁ASSISTANT:",
            "▁ <0xE7> <0x8C> <0xAB> ▁ <0xF0> <0x9F> <0x90> <0x88> . </s>",
        ),
    ),
}
PLAIN = {
    "caption": (("Describe.\n<image>", "a red cat."), 1, ("<s> <image>", "▁a ▁red ▁cat. <0x0A>")),
    "unusual whitespace": (("<image>", " a \ncat. "), 1, ("<s> <image>", "▁ ▁a ▁ <0x0A> c at. ▁ <0x0A>")),
    "unicode": (("<image>\nx", "猫 cat."), 1, ("<s> <image>", "▁ <0xE7> <0x8C> <0xAB> ▁cat. <0x0A>")),
}


@pytest.mark.parametrize("case", VICUNA)
def test_vicuna_v1_is_llavas_token_by_token(case, tokenizer, tmp_path):
    texts, num_images, pieces = VICUNA[case]
    expected = [(stretch, index % 2 == 1) for index, stretch in enumerate(pieces)]
    assert encoded(tokenizer, "vicuna_v1", *texts, num_images=num_images, folder=tmp_path) == expected


@pytest.mark.parametrize("case", PLAIN)
def test_plain_is_llavas_token_by_token(case, tokenizer, tmp_path):
    texts, num_images, pieces = PLAIN[case]
    expected = [(stretch, index % 2 == 1) for index, stretch in enumerate(pieces)]
    assert encoded(tokenizer, "plain", *texts, num_images=num_images, folder=tmp_path) == expected


def test_the_tokenizer_is_of_llamas_kind(tokenizer):
    text = "What  is\nthis? É 猫 🐈"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 258]) == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
