"""Collator and chat templates: tokens, supervision, padding and pixels of batches."""

import pytest
import torch
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import AutoProcessor

from dualspeed.chat_templates import TEMPLATE_NAMES, load_template, use_template
from dualspeed.data.collator import ConversationCollator, generation_inputs
from dualspeed.data.images import open_image
from dualspeed.errors import ImageError
from tests.support import tiny
from tests.support.samples import assistant, by_character, row, user, with_tokenizer

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


@pytest.fixture
def picture(tmp_path):
    """Function (width, height, colour) that writes an image and returns its path."""

    def write(width=28, height=28, colour="red"):
        path = tmp_path / f"{colour}-{width}x{height}.png"
        Image.new("RGB", (width, height), colour).save(path)
        return path

    return write


def text_of(processor, ids):
    """Text of character tokens without padding; the tokens of an image become one <image>."""
    text = "".join(processor.tokenizer.convert_ids_to_tokens(ids)).replace("<pad>", "")
    while "<image><image>" in text:
        text = text.replace("<image><image>", "<image>")
    return text


def supervised_of(processor, labels):
    return text_of(processor, labels[labels != -100])


def unpadded(batch, index):
    """Return (input_ids, labels) of one row without its padding."""
    keep = batch["attention_mask"][index].bool()
    return batch["input_ids"][index][keep].tolist(), batch["labels"][index][keep].tolist()


TWO_TURNS = [user("q", 1), assistant("a"), user("q2"), assistant("a2")]
EXPECTED = {
    "vicuna_v1": (SYSTEM + "USER: <image>\nq ASSISTANT: a</s>USER: q2 ASSISTANT: a2</s>", " a</s> a2</s>"),
    "turns": ("USER: <image>\nq ASSISTANT: a</s>USER: q2 ASSISTANT: a2</s>", " a</s> a2</s>"),
}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("template", EXPECTED)
def test_text_and_supervision_of_a_conversation_are_llavas(template, side, picture):
    processor = by_character(template)
    rows = [row("two turns", TWO_TURNS, [picture()]), row("text", [user("hello"), assistant("you\nthere?")])]
    batch = ConversationCollator(processor, padding_side=side)(rows)
    text, supervised = EXPECTED[template]
    assert text_of(processor, batch["input_ids"][0]) == "<s>" + text
    assert supervised_of(processor, batch["labels"][0]) == supervised
    assert supervised_of(processor, batch["labels"][1]) == " you\nthere?</s>"
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert (batch["input_ids"][batch["attention_mask"] == 0] == processor.tokenizer.pad_token_id).all()
    padded_column = {"right": -1, "left": 0}[side]
    assert batch["attention_mask"][:, padded_column].tolist() == [1, 0]


def test_plain_is_image_and_caption(picture):
    processor = by_character("plain")
    messages = [user("Describe the image.", 1), assistant("a red square")]
    batch = ConversationCollator(processor)([row("x", messages, [picture()])])
    assert text_of(processor, batch["input_ids"][0]) == "<s><image>a red square\n"
    assert supervised_of(processor, batch["labels"][0]) == "a red square\n"


def test_plain_refuses_a_turn_without_an_image():
    with pytest.raises(Exception, match="pairs of image and caption"):
        ConversationCollator(by_character("plain"))([row("x", [user("hello"), assistant("you")])])


def test_several_images_keep_their_places(picture):
    processor = by_character("turns")
    image, text = {"type": "image", "text": None}, {"type": "text", "text": "1: "}
    question = {"role": "user", "content": [text, image, {"type": "text", "text": "2: "}, image]}
    rows = [
        row("text", [user("q"), assistant("a")]),
        row("two", [question, assistant("b")], [picture(colour="red"), picture(colour="blue")]),
        row("one", [user("q", 1), assistant("c")], [picture(colour="white")]),
    ]
    batch = ConversationCollator(processor, with_num_images=True)(rows)
    assert batch["num_images"] == [0, 2, 1]
    assert text_of(processor, batch["input_ids"][1]) == "<s>USER: 1: <image>\n2: <image> ASSISTANT: b</s>"
    assert supervised_of(processor, batch["labels"][1]) == " b</s>"
    num_image_tokens = (batch["input_ids"] == processor.image_token_id).sum(dim=1)
    assert num_image_tokens.tolist() == [0, 2 * tiny.NUM_IMAGE_TOKENS, tiny.NUM_IMAGE_TOKENS]
    pictures = [open_image(path) for example in rows for path in example["images"]]
    assert torch.equal(batch["pixel_values"], processor.image_processor(pictures, return_tensors="pt").pixel_values)


def in_words():
    """Return a processor whose tokens are words with the blank before them, like Llama's."""
    words = ["▁yes", "▁no", "▁q", "▁USER:", "USER:", "▁ASSISTANT:", "\nq", "q"]
    processor = with_tokenizer(tiny.llava_processor(), words, pre_tokenizers.Metaspace())
    use_template(processor, "turns")
    return processor


@pytest.mark.parametrize(
    "make_processor", [*(lambda name=name: by_character(name) for name in TEMPLATE_NAMES), in_words]
)
def test_a_prompt_is_the_beginning_of_its_training_tokens(make_processor, picture):
    processor = make_processor()
    trained = ConversationCollator(processor)([row("x", [user("q", 1), assistant("yes")], [picture()])])
    prompt = generation_inputs(processor, [{"image": picture(), "prompt": "q"}])["input_ids"][0]
    first_supervised = (trained["labels"][0] != -100).nonzero()[0].item()
    assert prompt.tolist() == trained["input_ids"][0, :first_supervised].tolist()
    assert (prompt == processor.tokenizer.bos_token_id).sum() == 1


def test_a_token_that_begins_with_the_blank_before_the_answer_is_supervised(picture):
    batch = ConversationCollator(in_words())([row("x", [user("q", 1), assistant("yes")], [picture()])])
    assert supervised_of(in_words(), batch["labels"][0]) == "▁yes</s>"


def test_an_unknown_template_is_named_with_the_valid_ones():
    with pytest.raises(ValueError, match=r"'vicuna'.*valid: plain, turns, vicuna_v1"):
        load_template("vicuna")


def test_a_processor_keeps_its_template_when_saved(tmp_path):
    processor = by_character("plain")
    processor.save_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path).chat_template == load_template("plain")


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("make", [tiny.llava_processor, tiny.llava_next_processor])
def test_a_row_is_the_same_alone_and_in_a_batch(make, side, picture):
    collator = ConversationCollator(by_character("turns", make), padding_side=side)
    rows = [
        row("two turns", TWO_TURNS, [picture(60, 20)]),
        row("text", [user("hello"), assistant("you")]),
        row("two images", [user("which is larger?", 2), assistant("the first")], [picture(20, 90), picture(50, 50)]),
    ]
    batch = collator(rows)
    pixels = iter(batch["pixel_values"])
    for index, example in enumerate(rows):
        alone = collator([example])
        assert unpadded(batch, index) == unpadded(alone, 0)
        for expected in alone.get("pixel_values", []):
            # LLaVA-NeXT pads an image's tiles to the largest number in the batch.
            assert torch.equal(next(pixels)[: len(expected)], expected)
    assert next(pixels, None) is None


@pytest.mark.parametrize("make", [tiny.llava_processor, tiny.llava_next_processor])
def test_a_batch_without_images_has_no_pixels(make):
    batch = ConversationCollator(by_character("turns", make))([row("x", [user("hello"), assistant("you")])])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_images_of_different_shapes_fit_the_model(picture):
    # The stock model raises if placeholders and features differ in number.
    shapes = [(28, 28), (60, 20), (20, 90), (200, 3)]
    messages = [user("is there a red 1 ?", 1), assistant("yes")]
    rows = [row(str(shape), messages, [picture(*shape)]) for shape in shapes]
    batch = ConversationCollator(tiny.llava_next_processor())(
        [*rows, row("text", [user("how many ?"), assistant("2")])]
    )
    assert batch["image_sizes"].tolist() == [[height, width] for width, height in shapes]
    assert torch.isfinite(tiny.llava_next()(**batch).loss)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_long_row_is_cut_at_its_end(side, picture):
    processor = by_character("turns")
    rows = [row("long", TWO_TURNS, [picture()]), row("short", [user("q"), assistant("a")])]
    uncut, _ = unpadded(ConversationCollator(processor)(rows), 0)
    batch = ConversationCollator(processor, max_length=len(uncut) - 6, padding_side=side)(rows)
    ids, _ = unpadded(batch, 0)
    assert ids == uncut[:-6]
    assert supervised_of(processor, batch["labels"][0]) == " a</s>"
    assert supervised_of(processor, batch["labels"][1]) == " a</s>"


def test_image_tokens_are_never_cut(picture):
    collator = ConversationCollator(by_character("turns"), max_length=tiny.NUM_IMAGE_TOKENS)
    with pytest.raises(ValueError, match=r"'coco/7'.*max_length 16 would cut image tokens"):
        collator([row("coco/7", TWO_TURNS, [picture()])])


def test_a_row_with_more_images_than_placeholders_is_named(picture):
    collator = ConversationCollator(by_character("turns"))
    with pytest.raises(ValueError, match=r"'coco/7': 1 image placeholders, but 2 images"):
        collator([row("coco/7", TWO_TURNS, [picture(), picture()])])


def test_an_image_that_went_bad_is_named(tmp_path):
    collator = ConversationCollator(by_character("turns"))
    with pytest.raises(ImageError, match=r"gone\.png: missing"):
        collator([row("x", TWO_TURNS, [tmp_path / "gone.png"])])


def test_a_template_that_marks_no_answers_is_refused():
    processor = by_character("turns")
    processor.chat_template = "{{ messages[0].content }}{% if add_generation_prompt %}A:{% endif %}"
    with pytest.raises(ValueError, match=r"no \{% generation %\} block"):
        ConversationCollator(processor)


def test_an_unknown_padding_side_is_refused():
    with pytest.raises(ValueError, match="'top' is unknown; valid: left, right"):
        ConversationCollator(by_character("turns"), padding_side="top")


@pytest.mark.parametrize("make", [tiny.llava_processor, tiny.llava_next_processor])
def test_questions_become_prompts_padded_on_the_left(make, picture):
    processor = by_character("vicuna_v1", make)
    questions = [
        {"image": picture(60, 20), "prompt": "Is it?\nAnswer the question using a single word or phrase."},
        {"image": None, "prompt": "Why?"},
        {"image": picture(20, 90), "prompt": "q"},
    ]
    inputs = generation_inputs(processor, questions)
    texts = [text_of(processor, ids) for ids in inputs["input_ids"]]
    assert texts[0] == f"<s>{SYSTEM}USER: <image>\n{questions[0]['prompt']} ASSISTANT:"
    assert texts[1] == f"<s>{SYSTEM}USER: Why? ASSISTANT:"
    assert inputs["attention_mask"][:, -1].tolist() == [1, 1, 1]
    for index, question in enumerate(questions):
        alone = generation_inputs(processor, [question])["input_ids"][0]
        assert torch.equal(inputs["input_ids"][index][inputs["attention_mask"][index].bool()], alone)
    assert len(inputs["pixel_values"]) == 2


@pytest.mark.parametrize("make", [tiny.llava_processor, tiny.llava_next_processor])
def test_pixels_are_the_processors_own_bit_for_bit(make, tmp_path):
    """Images with all 256 values of a byte, which the processor resizes and crops."""
    processor, paths = make(), []
    for number, size in enumerate([(28, 28), (64, 40), (300, 31)]):
        pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(number))
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(paths[-1])
    batch = ConversationCollator(processor)([row(path.stem, [user("q", 1), assistant("a")], [path]) for path in paths])
    expected = processor.image_processor([open_image(path) for path in paths], return_tensors="pt").pixel_values
    assert torch.equal(batch["pixel_values"], expected)
