"""Supervised tokens of a conversation in any chat template: the answers, each with the token that ends its turn.

They are found in the first of these ways that the processor's template allows:

1. The template marks answers itself, by `{% generation %}` blocks; an end of sequence right behind one belongs to it.
2. It is a stock template with a training twin (dualspeed.chat_templates.twins), which renders the same text and has
   such blocks.
3. Turn by turn: what a template writes between the prompt for an answer and the end of the answer's turn. Each of these
   beginnings of a conversation has to be a beginning of the whole, which is checked for every conversation.

Blanks behind the token that ends a turn aren't supervised, and placeholders of images never are. The text that is
trained on is the processor's own template's in any case.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from transformers import BatchFeature, ProcessorMixin
from transformers.utils import logging
from transformers.utils.chat_template_utils import render_jinja_template

from dualspeed.chat_templates import TEMPLATE_NAMES, load_template
from dualspeed.chat_templates.twins import twin_of
from dualspeed.data.conversations import text_item
from dualspeed.errors import SupervisionError

PROCESSORS_CHOICE = inspect.signature(ProcessorMixin.apply_chat_template).parameters["return_tensors"].default
"""Value of `return_tensors` for what a processor makes by default: "auto", before transformers 5.23 None."""
GENERATION = re.compile(r"\{%[-+]?\s*generation\b")
PIECES = """
{%- for message in messages -%}
    {%- for piece in message.pieces -%}
        {%- if loop.index0 is odd -%}
            {%- generation -%}{{ piece }}{%- endgeneration -%}
        {%- else -%}
            {{ piece }}
        {%- endif -%}
    {%- endfor -%}
{%- endfor -%}
"""
"""Template that writes text as it is; every second piece of it is supervised."""
VALID = "valid: a template that has such blocks, as dualspeed.chat_templates.use_template(processor, name) sets one"

Messages = Sequence[Mapping[str, Any]]

logger = logging.get_logger(__name__)


class Rendered(NamedTuple):
    """Text of a conversation."""

    text: str
    spans: list[tuple[int, int]]
    """Start and end of each supervised stretch, in characters."""


class Supervision:
    """Way to find the supervised tokens of a processor's conversations; `Supervision.of` chooses it.

    Args:
        template: Jinja source that conversations are rendered with.
        by_turns: True for a template without `{% generation %}` blocks.
        settings: variables of the template.
    """

    def __init__(self, processor: ProcessorMixin, template: str, by_turns: bool, **settings: Any) -> None:
        self.processor = processor
        self.template = template
        self.by_turns = by_turns
        self.settings = {**processor.tokenizer.special_tokens_map, **settings}
        self._marks = tuple(token for token in processor.tokenizer.get_added_vocab() if token.strip())

    @classmethod
    def of(cls, processor: ProcessorMixin) -> "Supervision":
        """Supervision in the processor's own chat template.

        Raises:
            SupervisionError: no template, no fast tokenizer, or a template whose answers can't be found.
        """
        template = own_template(processor)
        if not getattr(processor.tokenizer, "is_fast", True):
            name = type(processor.tokenizer).__name__
            raise SupervisionError(f"{name} doesn't say which characters a token stands for; valid: a fast tokenizer")
        if (twin := twin_of(template)) is not None:
            return cls(processor, twin.source, by_turns=False, **twin.settings)
        supervision = cls(processor, template, by_turns=not GENERATION.search(template))
        answer = supervision._try_out()
        is_open = answer is not None and not answer.endswith(supervision._marks)
        if is_open and template not in map(load_template, TEMPLATE_NAMES):
            logger.warning_once(
                "the processor's chat template ends an answer without a special token, so that a model trained on it "
                "isn't taught where to stop; dualspeed.chat_templates.use_template(processor, name) sets one that is"
            )
        return supervision

    def render(self, messages: Messages) -> Rendered:
        """Text of a conversation and what of it is supervised; SupervisionError where the template refuses it."""
        if self.by_turns:
            text, spans = self._render_by_turns(messages)
        else:
            (text,), (marked,) = self._rendered(messages, return_assistant_tokens_mask=True)
            spans = [(start, self._end_of_turn(text, start, end)) for start, end in marked]
        image_token, num_images = getattr(self.processor, "image_token", None), len(images_of(messages))
        if image_token and text.count(image_token) != num_images:
            raise SupervisionError(
                f"the chat template writes {text.count(image_token)} places of images for {num_images} images; "
                f"valid: images in user turns alone, and no {image_token} in texts"
            )
        return Rendered(text, spans)

    def encode(
        self, conversations: Sequence[Messages], names: Sequence[str] | None = None, **processor_kwargs: Any
    ) -> BatchFeature:
        """Unpadded tokens of conversations, as the processor makes them, with `assistant_masks` and the images' inputs.

        Args:
            conversations: messages whose image items hold an image each, {"type": "image", "image": ...}.
            names: name of each conversation, for errors.
            processor_kwargs: arguments of the processor's call.
        """
        pieces = []
        for index, messages in enumerate(conversations):
            try:
                rendered = self.render(messages)
            except SupervisionError as error:
                raise (SupervisionError(f"sample {names[index]!r}: {error}") if names else error) from None
            pieces.append([{"role": "user", "content": images_of(messages), "pieces": pieces_of(rendered)}])
        encoded = self.processor.apply_chat_template(
            pieces,
            chat_template=PIECES,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            return_tensors=PROCESSORS_CHOICE,
            # Some processors make tensors by default, which rows of different lengths don't become.
            processor_kwargs={"text_kwargs": {"padding": False, "return_tensors": None}, **processor_kwargs},
        )
        image_ids = image_token_ids(self.processor)
        encoded["assistant_masks"] = [
            np.array(mask, dtype=bool) & ~np.isin(row, image_ids)
            for mask, row in zip(encoded["assistant_masks"], encoded["input_ids"], strict=True)
        ]
        return encoded

    def _rendered(self, messages: Messages, **settings: Any) -> tuple[list[str], list[list[tuple[int, int]]]]:
        """Texts and spans that transformers renders of one conversation."""
        import jinja2  # not where only steps are timed

        try:
            return render_jinja_template(
                conversations=[messages], chat_template=self.template, **{**self.settings, **settings}
            )
        except (jinja2.TemplateError, TypeError, AttributeError) as error:
            raise SupervisionError(str(error)) from error

    def _end_of_turn(self, text: str, start: int, end: int) -> int:
        """End of a block with the token that ends the sequence, where a template writes that right behind the block."""
        eos = getattr(self.processor.tokenizer, "eos_token", None)
        return end + len(eos) if eos and text.startswith(eos, end) else self._trimmed(text, start, end)

    def _trimmed(self, text: str, start: int, end: int) -> int:
        """End of a span of text without the blanks behind the token that ends the turn."""
        whole = text[start:end].rstrip()
        return start + len(whole) if whole.endswith(self._marks) else end

    def _render_by_turns(self, messages: Messages) -> Rendered:
        text, spans = self._text(messages), []
        place = 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            turns = self._text(messages[: index + 1])
            end = self._trimmed(turns, 0, len(turns))
            start = self._end_of_prompt(messages[:index], turns[:end])
            if text[:end] != turns[:end] or start < place:
                raise SupervisionError(
                    f"the chat template writes the first {index + 1} messages differently when more follow, so that "
                    "what is supervised can't be found; valid: a conversation of one answer, or a template with "
                    "{% generation %} blocks"
                )
            spans.append((start, end))
            place = end
        return Rendered(text, spans)

    def _text(self, messages: Messages, **settings: Any) -> str:
        return self._rendered(messages, **settings)[0][0]

    def _end_of_prompt(self, before: Messages, turns: str) -> int:
        """Length of the prompt that an answer, at the end of `turns`, begins behind."""
        for settings in (prompt_settings(self.template), {}):
            prompt = self._text(before, add_generation_prompt=True, **settings)
            if turns.startswith(prompt):
                return len(prompt)
        raise SupervisionError(
            f"the chat template's prompt for message {len(before) + 1} isn't how the answer begins, so that what is "
            "supervised can't be found; valid: a template with {% generation %} blocks"
        )

    def _try_out(self) -> str | None:
        """Supervised text of an answer to a question, or to an image with one; None if blocks take neither.

        Raises:
            SupervisionError: the answer isn't in it.
        """
        reasons = []
        for items in ([text_item("question")], [{"type": "image"}, text_item("question")]):
            probe = [{"role": "user", "content": items}, {"role": "assistant", "content": [text_item("answer")]}]
            try:
                text, spans = self.render(probe)
            except SupervisionError as error:
                reasons.append(str(error))
                continue
            if found := [text[start:end] for start, end in spans if "answer" in text[start:end]]:
                return found[0]
            reasons.append("an answer isn't in what it marks" if spans else "it writes no answer")
            break
        else:
            if not self.by_turns:
                return None
        blocks = "" if self.by_turns is False else "has no {% generation %} block, is none with a training twin, and "
        raise SupervisionError(f"the processor's chat template {blocks}can't be masked ({reasons[-1]}); {VALID}")


def own_template(processor: ProcessorMixin) -> str:
    """Chat template that a processor renders conversations with; SupervisionError if it has none."""
    template = processor.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise SupervisionError(f"the {type(processor).__name__} has no chat template; {VALID}")
    return template


def prompt_settings(template: str) -> dict[str, Any]:
    """Variables for a prompt whose answer has no thoughts, as in training data; none for a template without any."""
    return {"enable_thinking": False} if "enable_thinking" in template else {}


def image_token_ids(processor: ProcessorMixin) -> list[int]:
    """Tokens that stand for visual tokens."""
    return [token for token in getattr(processor, "image_token_ids", [processor.image_token_id]) if token is not None]


def pieces_of(rendered: Rendered) -> list[str]:
    """Text in pieces: every second one is supervised."""
    places = [0, *(place for span in rendered.spans for place in span), len(rendered.text)]
    return [rendered.text[start:end] for start, end in pairwise(places)]


def images_of(messages: Messages) -> list[Mapping[str, Any]]:
    """Image items of a conversation."""
    items = [item for message in messages if not isinstance(message["content"], str) for item in message["content"]]
    return [item for item in items if item["type"] == "image"]
