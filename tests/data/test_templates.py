"""Training twins of stock chat templates: the same text, the same refusals, and the tokens that are supervised."""

from pathlib import Path
from types import SimpleNamespace

import jinja2
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from dualspeed.chat_templates import twins
from dualspeed.chat_templates.twins import TWINS, hash_of_text, twin_of
from dualspeed.data.supervision import Supervision
from dualspeed.errors import SupervisionError
from tests.support.tiny_chat import CHATS, byte_tokenizer, stock_template

TWIN_NAMES = [name for name in CHATS if name != "lfm2_5_vl"]
QWEN3_5 = ("qwen3_5_nothink", "qwen3_5_think", "qwen3_6")
IMAGE = {"type": "image"}


def text(words):
    return {"type": "text", "text": words}


def turns(*contents):
    """Messages of user and assistant in turn; a string is one item of text."""
    contents = [[text(content)] if isinstance(content, str) else list(content) for content in contents]
    return [{"role": ("user", "assistant")[index % 2], "content": content} for index, content in enumerate(contents)]


def system(content, messages):
    return [{"role": "system", "content": [text(content)] if isinstance(content, str) else content}, *messages]


QUESTION = [IMAGE, text("What is this?")]
CONVERSATIONS = {
    "one turn": turns("hello", "yes"),
    "image": turns(QUESTION, "a cat"),
    "image behind the text": turns([text("What is this?"), IMAGE], "a cat"),
    "image alone": turns([IMAGE], "a cat"),
    "several images": turns([IMAGE, text("or"), IMAGE, text("?"), IMAGE], "the first"),
    "several turns": turns(QUESTION, "a cat", "old?", "no", "sure?", "yes"),
    "image in a later turn": turns("hello", "hi", QUESTION, "a cat"),
    "images in all turns": turns(QUESTION, "a cat", [IMAGE, IMAGE, text("these?")], "dogs"),
    "system": system("Be brief.", turns(QUESTION, "a cat")),
    "system and several turns": system("Be brief.", turns(QUESTION, "a cat", "old?", "no")),
    "empty system": system("", turns("hello", "yes")),
    "system of blanks": system("  \n", turns("hello", "yes")),
    "system without items": system([], turns("hello", "yes")),
    "unicode": turns("É 猫 🐈 \u202eabc", "ñ 猫 🐈‍⬛ é"),
    "blanks at the ends": turns("  q \n\n", "\n a  ", " q2\t", "\u00a0a2 \n"),
    "line breaks inside": turns("a\n\nb\r\nc", "d\n\n\ne"),
    "several items of text": turns([text("a "), text(" b")], [text("c "), text(" d\n")]),
    "empty answer": turns("hello", ""),
    "marks of templates in the text": turns("what is {{ x }} {% if %}?", "{% generation %} is {# a tag #}"),
    "thoughts in answers": turns("1+1?", "<think>\neasy\n</think>\n\n2", "2+2?", "<think>\nhm\n</think>\n\n4"),
    "other thoughts": turns("1+1?", "<|channel>thought\neasy<channel|>2", "2+2?", "\n</think>\n4 <|channel>more"),
    "strings": [{"role": "user", "content": " hello "}, {"role": "assistant", "content": " yes\n"}],
    "string of a system turn": [{"role": "system", "content": " Be brief. "}, *turns("hello", "yes")],
    "question last": turns("hello", "yes", "and?"),
    "items as datasets store them": [
        {"role": "user", "content": [{"type": "image", "text": None}, text("hello")]},
        {"role": "assistant", "content": [text("yes")]},
    ],
}
ODD = {
    "no items": turns([], []),
    "system alone": system("Be brief.", []),
    "two system turns": system("a", system("b", turns("hello", "yes"))),
    "system at the end": [*turns("hello", "yes"), *system("late", [])],
    "system with an image": system([IMAGE, text("x")], turns("hello", "yes")),
    "answer first": turns("hello", "yes", "and?", "no")[1:],
    "two questions": [*turns("hello"), *turns("hello", "yes")],
    "two answers": [*turns("hello", "yes"), {"role": "assistant", "content": [text("no")]}, *turns("and?", "so")],
    "image in an answer": turns("draw", [IMAGE, text("there")]),
    "unknown role": [*turns("hello", "yes"), {"role": "critic", "content": [text("bad")]}],
    "item of unknown type": turns([{"type": "smell", "smell": "x"}], "yes"),
    "content of unknown type": [{"role": "user", "content": 5}, *turns("hello", "yes")],
}


def rendered(template, messages, tokenizer, **settings):
    """Text and spans of a conversation, or None if the template raises."""
    try:
        (made,), spans = render_jinja_template(
            conversations=[messages],
            chat_template=template,
            return_assistant_tokens_mask="generation" in template,
            **tokenizer.special_tokens_map,
            **settings,
        )
    except (jinja2.TemplateError, TypeError):
        return None
    return made, spans


@pytest.fixture(scope="module", params=TWIN_NAMES)
def pair(request):
    """Name, stock template, twin and tokenizer."""
    stock = stock_template(request.param)
    return request.param, stock, twin_of(stock), byte_tokenizer(CHATS[request.param])


@pytest.mark.parametrize("case", [*CONVERSATIONS, *ODD])
def test_a_twin_renders_the_stock_text_and_raises_where_the_stock_template_raises(case, pair):
    _, stock, twin, tokenizer = pair
    messages = (CONVERSATIONS | ODD)[case]
    expected = rendered(stock, messages, tokenizer)
    made = rendered(twin.source, messages, tokenizer, **twin.settings)
    assert (made and made[0]) == (expected and expected[0])


def test_a_twin_writes_nothing_of_no_messages_that_the_stock_template_does_not(pair):
    _, stock, twin, tokenizer = pair
    made = rendered(twin.source, [], tokenizer, **twin.settings)
    assert made is None or made[0] == rendered(stock, [], tokenizer)[0]


def test_twenty_conversations_are_none_that_the_stock_template_refuses(pair):
    _, stock, _, tokenizer = pair
    made = [rendered(stock, messages, tokenizer) for messages in CONVERSATIONS.values()]
    assert sum(text is not None for text in made) >= 20


def supervision(pair, by_turns):
    """Supervision of a stock template, by its twin or turn by turn."""
    _, stock, twin, tokenizer = pair
    processor = SimpleNamespace(tokenizer=tokenizer, chat_template=stock)
    if by_turns:
        return Supervision(processor, stock, by_turns=True)
    made = Supervision.of(processor)
    assert made.template == twin.source
    return made


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_a_twin_supervises_what_is_found_turn_by_turn(case, pair):
    name, stock, _, tokenizer = pair
    messages = CONVERSATIONS[case]
    if rendered(stock, messages, tokenizer) is None:
        pytest.skip("the stock template refuses it")
    by_twin = supervision(pair, by_turns=False).render(messages)
    answers = [message for message in messages if message["role"] == "assistant"]
    if name in QWEN3_5 and (messages[-1]["role"] == "user" or len(answers) > 1):
        # An answer behind the last question stands behind its thoughts, which it loses when a question follows.
        with pytest.raises(SupervisionError, match="what is supervised can't be found"):
            supervision(pair, by_turns=True).render(messages)
    else:
        assert supervision(pair, by_turns=True).render(messages) == by_twin
    end = CHATS[name].end_of_turn
    assert [by_twin.text[start:stop][-len(end) :] for start, stop in by_twin.spans] == [end] * len(answers)


@pytest.mark.parametrize("name", QWEN3_5)
def test_thoughts_in_an_answer_of_qwen_are_supervised_and_empty_ones_are_not(name):
    template, tokenizer = stock_template(name), byte_tokenizer(CHATS[name])
    supervision = Supervision.of(SimpleNamespace(tokenizer=tokenizer, chat_template=template))

    def supervised(answer):
        made, ((start, end),) = supervision.render(turns("1+1?", answer))
        return made[:start][-len("<think>\n\n</think>\n\n") :], made[start:end]

    assert supervised("2") == ("<think>\n\n</think>\n\n", "2<|im_end|>")
    assert supervised("<think>easy</think>2")[1] == "easy\n</think>\n\n2<|im_end|>"


def test_every_twin_is_one_of_a_stock_template():
    stock = {stock_template(name): name for name in TWIN_NAMES}
    assert {hash_of_text(template) for template in stock} == TWINS.keys()
    files = {path.name for path in (Path(twins.__file__).parent / "twins").glob("*.jinja")}
    assert {twin.file for twin in TWINS.values()} == files


@pytest.mark.parametrize("name", TWIN_NAMES)
def test_a_twin_is_found_whatever_line_ends_a_template_was_saved_with(name):
    template = stock_template(name)
    for saved in (template, template.removesuffix("\n"), template.replace("\n", "\r\n")):
        assert twin_of(saved) == twin_of(template) is not None
    assert twin_of(template + " ") is None


def test_the_stock_template_of_lfm2_5_vl_marks_answers_itself():
    template = stock_template("lfm2_5_vl")
    assert twin_of(template) is None
    processor = SimpleNamespace(tokenizer=byte_tokenizer(CHATS["lfm2_5_vl"]), chat_template=template)
    for case in ("several turns", "system", "blanks at the ends", "unicode"):
        text, spans = Supervision.of(processor).render(CONVERSATIONS[case])
        answers = [message["content"][0]["text"] for message in CONVERSATIONS[case] if message["role"] == "assistant"]
        assert [text[start:end] for start, end in spans] == [f"{answer}<|im_end|>" for answer in answers]
        assert Supervision(processor, template, by_turns=True).render(CONVERSATIONS[case]) == (text, spans)
