"""Supervised tokens in the templates of real processors: answers with the tokens that end their turns, and no other."""

import json
from types import SimpleNamespace

import pytest
import torch
from datasets import load_from_disk
from PIL import Image
from transformers import AutoProcessor
from transformers.utils import is_torchvision_available

from dualspeed.chat_templates import TEMPLATE_NAMES, load_template, template_in_use, use_template
from dualspeed.chat_templates.twins import twin_of
from dualspeed.data import supervision
from dualspeed.data.collator import ConversationCollator, generation_inputs
from dualspeed.data.images import inspect_image
from dualspeed.data.lengths import choose_method
from dualspeed.data.prepare import prepare_dataset
from dualspeed.data.processing import load_processor
from dualspeed.data.supervision import Supervision, image_token_ids
from dualspeed.errors import SampleError, SupervisionError
from dualspeed.settings.recipe import DataRecipe
from tests.support.noise import noise_image
from tests.support.samples import assistant, entry, row, user
from tests.support.tiny_chat import CHATS, stock_template, tiny_chat, tiny_processor

pytestmark = [pytest.mark.torchvision] if is_torchvision_available() else []
NAMES = [name for name, chat in CHATS.items() if is_torchvision_available() or not chat.needs_torchvision]
"""Names whose processors can be made here; those that take video take images alone, unless there is torchvision."""


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def pictures(tmp_path):
    """Paths of pictures of three shapes."""
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for seed, size in enumerate([(60, 40), (30, 90), (64, 64)]):
        noise_image(size, seed).save(paths[seed])
    return paths


@pytest.fixture
def rows(pictures):
    """Conversations with no image, one and several, in one turn and in several."""
    return [
        row("text", [user("hello"), assistant("good day")]),
        row("one", [user("is there é?", 1), assistant("yes, 猫")], pictures[:1]),
        row("several", [user("which?", 2), assistant("the first"), user("and now?", 1), assistant("no")], pictures),
    ]


def supervised_of(processor, labels):
    return processor.tokenizer.decode(labels[labels != -100])


@pytest.mark.parametrize("side", ["right", "left"])
def test_supervised_tokens_are_the_answers_and_their_end_tokens(name, rows, side):
    processor, end = tiny_processor(name), CHATS[name].end_of_turn
    batch = ConversationCollator(processor, padding_side=side)(rows)
    # These templates put a blank before an answer, which the prompt doesn't have.
    blank = " " if name in ("idefics3", "smolvlm", "llava_next") else ""
    expected = [["good day"], ["yes, 猫"], ["the first", "no"]]
    found = [supervised_of(processor, labels) for labels in batch["labels"]]
    assert found == ["".join(f"{blank}{answer}{end}" for answer in answers) for answers in expected]
    is_supervised = batch["labels"] != -100
    assert torch.equal(batch["labels"][is_supervised], batch["input_ids"][is_supervised])
    assert not (is_supervised & (batch["attention_mask"] == 0)).any()
    assert not torch.isin(batch["labels"], torch.tensor(image_token_ids(processor))).any()
    assert torch.isin(batch["input_ids"], torch.tensor(image_token_ids(processor))).any(dim=1).tolist() == [
        False,
        True,
        True,
    ]


def test_tokens_are_those_of_the_stock_template(name, rows):
    """A batch of one row, since processors pad rows to a length of their own."""
    processor = tiny_processor(name)
    for example in rows:
        batch = ConversationCollator(processor)([example])
        paths = iter(example["images"])
        messages = [
            {
                "role": message["role"],
                "content": [
                    {"type": "image", "image": Image.open(next(paths))} if item["type"] == "image" else item
                    for item in message["content"]
                ],
            }
            for message in example["messages"]
        ]
        stock = processor.apply_chat_template(
            [messages], tokenize=True, return_dict=True, processor_kwargs={"return_tensors": "pt"}, return_tensors="pt"
        )
        assert batch["input_ids"].tolist() == stock["input_ids"].tolist()
        assert batch.keys() - {"labels"} == stock.keys()
        for key in batch.keys() - {"labels"}:
            assert torch.equal(batch[key], stock[key]), key


def test_prompts_are_the_beginnings_of_training_tokens(name, pictures):
    processor = tiny_processor(name)
    for messages, images in (([user("q?", 1), assistant("yes")], pictures[:1]), ([user("q?"), assistant("yes")], [])):
        trained = ConversationCollator(processor)([row("x", messages, images)])
        prompt = generation_inputs(processor, [{"image": (images or [None])[0], "prompt": "q?"}])["input_ids"][0]
        first_supervised = (trained["labels"][0] != -100).nonzero()[0].item()
        assert prompt.tolist() == trained["input_ids"][0, :first_supervised].tolist()


def test_a_saved_checkpoint_has_the_stock_template_and_the_same_supervision(name, rows, tmp_path):
    processor = AutoProcessor.from_pretrained(tiny_chat(name, tmp_path))
    one, other = (ConversationCollator(made)(rows) for made in (processor, tiny_processor(name)))
    assert one.keys() == other.keys()
    assert {key: value.shape for key, value in one.items()} == {key: value.shape for key, value in other.items()}
    # AutoProcessor takes torchvision's image processors where it can, which resize a little differently.
    compared = one.keys() - ({"pixel_values"} if is_torchvision_available() else set())
    assert all(torch.equal(one[key], other[key]) for key in compared)
    assert processor.chat_template == stock_template(name)


def test_lengths_are_those_of_the_batch(name, rows, pictures):
    processor, reports = tiny_processor(name), {}
    for path in map(str, pictures):
        reports[path] = inspect_image(path)
    tokens_of = choose_method(processor, rows[2], reports)
    batch = ConversationCollator(processor)(rows)
    for tokens, ids, labels, mask in zip(
        tokens_of(processor, rows, reports), batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
    ):
        assert tokens.widths.sum() == mask.sum()
        assert tokens.is_supervised.sum() == (labels != -100).sum()
        is_image = torch.isin(ids, torch.tensor(image_token_ids(processor)))
        assert tokens.widths[tokens.is_image].sum() == is_image.sum()


def test_rows_of_several_formats_make_the_same_batch(name, pictures):
    collator = ConversationCollator(tiny_processor(name))
    opened = Image.open(pictures[0])
    same = [
        row("x", [user("q?", 1), assistant("yes")], pictures[:1]),
        {"id": "x", "messages": [user("q?"), assistant("yes")], "images": [opened]},
        {
            "id": "x",
            "messages": [{"role": "user", "content": "q?"}, {"role": "assistant", "content": "yes"}],
            "images": [opened],
        },
        {"id": "x", "prompt": "q?", "completion": "yes", "image": opened},
        {"id": "x", "images": [opened], "texts": [{"user": "q?", "assistant": "yes"}]},
    ]
    first, *others = (collator([example]) for example in same)
    for other in others:
        assert all(torch.equal(first[key], other[key]) for key in first)


def test_a_row_that_cannot_be_read_is_named():
    with pytest.raises(SampleError, match=r"sample 'row 2 of the batch': .*valid: "):
        collator = ConversationCollator(tiny_processor("qwen3_vl"))
        collator([row("x", [user("q"), assistant("a")]), {"question": "q", "answer": "a"}])


def test_a_conversation_that_the_template_refuses_is_named():
    collator = ConversationCollator(tiny_processor("gemma3"))
    with pytest.raises(SampleError, match="sample 'x': turns do not alternate; valid: user, assistant, user"):
        collator([row("x", [user("q"), user("q"), assistant("a")])])


def processor_of(template, name="qwen3_vl"):
    """Processor of a family with another template."""
    processor = tiny_processor(name)
    processor.chat_template = template
    return processor


UNKNOWN = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {% for i in m.content %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' if i.type == 'image' else i.text }}{% endfor %}"
    "{{ eos_token + '\n' }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_an_unknown_template_is_masked_turn_by_turn(rows):
    processor = processor_of(UNKNOWN)
    assert Supervision.of(processor).by_turns
    batch = ConversationCollator(processor)(rows)
    expected = [" good day<|im_end|>", " yes, 猫<|im_end|>", " the first<|im_end|> no<|im_end|>"]
    assert [supervised_of(processor, labels) for labels in batch["labels"]] == expected


def test_a_row_that_is_written_differently_when_more_follows_is_refused(rows):
    template = UNKNOWN.replace("{% if add", "{{ 'end' if not add_generation_prompt else '' }}{% if add")
    collator = ConversationCollator(processor_of(template))
    assert supervised_of(collator.processor, collator(rows[:1])["labels"][0]) == " good day<|im_end|>\nend"
    with pytest.raises(SupervisionError, match=r"sample 'several': .*differently.*valid: a conversation of one answer"):
        collator(rows)


@pytest.mark.parametrize(
    "template, reason",
    [
        (None, "the .*Processor.* has no chat template; valid: a template"),
        ("{{ messages[0].content }}{% if add_generation_prompt %}A:{% endif %}", "isn't how the answer begins"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "it writes no answer|an answer isn't in what it marks"),
        ("{{ raise_exception('not today') }}", r"can't be masked \(not today\)"),
        ("{% for m in messages %}", "can't be masked"),
        ("{% generation %}{% endgeneration %}", "chat template can't be masked .an answer isn't in what it marks"),
    ],
)
def test_a_template_whose_answers_cannot_be_found_is_refused_at_once(template, reason):
    with pytest.raises(SupervisionError, match=reason) as raised:
        ConversationCollator(processor_of(template))
    assert "valid: " in str(raised.value) and "\n" not in str(raised.value)


def test_a_tokenizer_without_places_of_tokens_is_refused():
    processor = SimpleNamespace(tokenizer=SimpleNamespace(is_fast=False), chat_template=UNKNOWN)
    with pytest.raises(SupervisionError, match="valid: a fast tokenizer"):
        Supervision.of(processor)


@pytest.mark.parametrize("template", [UNKNOWN, UNKNOWN.replace("eos_token", "''")])
def test_a_template_that_does_not_teach_where_to_stop_is_warned_of(template, monkeypatch):
    said = []
    monkeypatch.setattr(supervision.logger, "warning_once", said.append)
    processor = processor_of(template)
    Supervision.of(processor)
    assert len(said) == ("eos_token" not in template)
    for name in TEMPLATE_NAMES:
        use_template(processor, name)
        Supervision.of(processor)
    assert len(said) == ("eos_token" not in template)


def test_an_image_in_an_answer_is_not_supervised(pictures):
    processor = tiny_processor("qwen2_5_vl")
    answer = {"role": "assistant", "content": [{"type": "image"}, {"type": "text", "text": "this"}]}
    batch = ConversationCollator(processor)([row("x", [user("draw"), answer], pictures[:1])])
    assert (batch["input_ids"] == processor.image_token_id).any()
    assert supervised_of(processor, batch["labels"][0]) == "<|vision_start|><|vision_end|>this<|im_end|>"


@pytest.mark.parametrize("side", ["right", "left"])
def test_end_of_sequence_pads_where_a_tokenizer_has_no_padding_token(rows, side):
    processor, usual = tiny_processor("qwen3_vl"), tiny_processor("qwen3_vl")
    processor.tokenizer.pad_token = None
    assert processor.tokenizer.pad_token_id is None
    batch, expected = (ConversationCollator(made, padding_side=side)(rows) for made in (processor, usual))
    is_padding = batch["attention_mask"] == 0
    assert is_padding.any() and (batch["input_ids"][is_padding] == processor.tokenizer.eos_token_id).all()
    assert torch.equal(batch["labels"], expected["labels"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    prompts = generation_inputs(processor, [{"image": None, "prompt": prompt} for prompt in ("q", "longer")])
    assert prompts["input_ids"][0, 0] == processor.tokenizer.eos_token_id and prompts["attention_mask"][0, 0] == 0
    processor.tokenizer.eos_token = None
    with pytest.raises(SampleError, match="neither a padding token nor one that ends a sequence; valid: "):
        ConversationCollator(processor)(rows)


@pytest.mark.parametrize(
    "messages, num_images",
    [
        ([{"role": "system", "content": [{"type": "image"}]}, user("q"), assistant("a")], 1),
        ([user("what is <|image_pad|>?"), assistant("a token")], 0),
        ([user("q", 1), assistant("it is <|image_pad|>")], 1),
    ],
)
def test_images_that_the_template_writes_no_place_for_are_refused(messages, num_images, pictures):
    collator = ConversationCollator(tiny_processor("qwen3_vl"))
    with pytest.raises(SampleError, match=rf"sample 'x': .* places of images for {num_images} images; valid: "):
        collator([row("x", messages, pictures[:num_images])])


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_5_think", "gemma3", "idefics3"])
def test_data_are_prepared_in_the_models_own_template(name, pictures, tmp_path):
    model = tiny_chat(name, tmp_path / "model")
    turns = ("<image>\nWhat is é?", "a cat", "Old?", "no")
    entries = [entry(*turns, name=str(number), image=path.name) for number, path in enumerate(pictures)]
    entries.append(entry("hello", "good day", name="text"))
    (tmp_path / "data.json").write_text(json.dumps(entries))
    recipe = DataRecipe(annotations=str(tmp_path / "data.json"), images=str(tmp_path), chat_template="auto")
    manifest = prepare_dataset(recipe, model, tmp_path / "out")
    prepared = load_from_disk(tmp_path / "out")
    assert len(prepared) == 4 and not manifest["num_dropped"]
    processor = load_processor(model, "auto")
    assert processor.chat_template == stock_template(name)
    batch = ConversationCollator(processor)(list(prepared))
    assert batch["attention_mask"].sum(dim=1).tolist() == prepared["num_tokens"]


def test_the_template_in_use_is_the_checkpoints_own_or_its_twin(tmp_path):
    for name in ("qwen3_5_think", "qwen3_6"):
        tiny_processor(name).save_pretrained(tmp_path / name)
    processor_of(UNKNOWN).save_pretrained(tmp_path / "unknown")
    twin = json.dumps([twin_of(stock_template("qwen3_6")).source, {}])
    assert template_in_use("auto", tmp_path / "qwen3_6") == template_in_use("auto", tmp_path / "qwen3_5_think") == twin
    assert template_in_use("auto", tmp_path / "unknown") == UNKNOWN
    assert template_in_use("plain", tmp_path / "unknown") == load_template("plain")
    (tmp_path / "unknown/chat_template.jinja").rename(tmp_path / "unknown/other.jinja")
    assert template_in_use("auto", tmp_path / "unknown") == ""
    (tmp_path / "unknown/chat_template.json").write_text(json.dumps({"chat_template": UNKNOWN}))
    assert template_in_use("auto", tmp_path / "unknown") == UNKNOWN


BESIDE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{% for i in m.content %}"
    "{% if i.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif m.role == 'assistant' %}"
    "{% generation %}{{ '\\n' + i.text }}{% endgeneration %}{% else %}{{ '\\n' + i.text }}{% endif %}{% endfor %}"
    "<|im_end|>{% endfor %}"
)
"""Template in the form of LLaVA-OneVision's, whose blocks end before the token that ends the turn."""


def test_the_end_of_sequence_right_behind_a_block_is_supervised(rows):
    processor = processor_of(BESIDE)
    batch = ConversationCollator(processor)(rows)
    expected = ["\ngood day<|im_end|>", "\nyes, 猫<|im_end|>", "\nthe first<|im_end|>\nno<|im_end|>"]
    assert [supervised_of(processor, labels) for labels in batch["labels"]] == expected
    processor.tokenizer.eos_token = "<|endoftext|>"
    batch = ConversationCollator(processor)(rows)
    assert supervised_of(processor, batch["labels"][0]) == "\ngood day"
