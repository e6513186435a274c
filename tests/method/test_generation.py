"""Every argument of stock generation, in both modes.

Fast mode that keeps all tokens and has no isolator reads the stock prompt, so its results are the stock ones, whatever
the argument; on pruned tokens the caller sees the same lengths and prompts.
"""

import inspect
from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    set_seed,
)
from transformers.generation import BaseStreamer

from dualspeed import DualSpeedConfig, DualSpeedModel, Mode
from dualspeed.errors import ConfigError
from tests.support import tiny
from tests.support.batches import collate, sample

NEW = 6
COMMON = 49
"""Token that the model would repeat for ever; without it, answers vary."""
END = 10


def prompt() -> dict[str, torch.Tensor]:
    """Two prompts with one image and with two, padded on the left."""
    batch = collate([sample("llava", 0, 1), sample("llava", 1, 2)], padding_side="left")
    return {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}


LENGTH = prompt()["input_ids"].shape[1]


class Forbid(LogitsProcessor):
    """Forbids the first tokens of the usual answers behind the whole prompt, and records the lengths that it sees."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, input_ids, scores):
        self.lengths.append(input_ids.shape[1])
        if input_ids.shape[1] == LENGTH:
            scores = scores.clone()
            scores[:, [55, 39]] = -1e9
        return scores


class StopAtLength(StoppingCriteria):
    """Stops every row at a length of the whole sequence."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= LENGTH + 3)


class Collect(BaseStreamer):
    """Collects what is streamed."""

    def __init__(self) -> None:
        self.values, self.ended = [], False

    def put(self, value):
        self.values.append(value.tolist())

    def end(self):
        self.ended = True


def allowed(row: int, ids: torch.Tensor) -> list[int]:
    """Even tokens for prompts of the given length, by the whole prompt that it sees."""
    assert ids[:LENGTH].tolist() == prompt()["input_ids"][row].tolist()
    return list(range(6, 60, 2))


# Argument of generate -> arguments that show it. Functions make what must be new for each call.
SHOWN: dict[str, dict[str, Any]] = {
    "greedy": {},
    "generation_config": {"generation_config": GenerationConfig(max_new_tokens=3)},
    "generation_config max_length": {"generation_config": GenerationConfig(max_length=LENGTH + 2)},
    "logits_processor": {"logits_processor": lambda: LogitsProcessorList([Forbid()])},
    "stopping_criteria": {"stopping_criteria": lambda: StoppingCriteriaList([StopAtLength()])},
    "stopping_criteria stock": {"stopping_criteria": lambda: StoppingCriteriaList([MaxLengthCriteria(LENGTH + 2)])},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": allowed},
    "synced_gpus": {"synced_gpus": False},
    "max_length": {"max_length": LENGTH + 4, "max_new_tokens": None},
    "min_length": {"min_length": LENGTH + 6, "eos_token_id": END},
    "min_new_tokens": {"min_new_tokens": NEW, "eos_token_id": END},
    "num_beams": {"num_beams": 3},
    "beams, all returned": {"num_beams": 3, "num_return_sequences": 3},
    "samples": {"do_sample": True, "num_return_sequences": 3, "temperature": 2.0, "top_k": 20},
    "repetition_penalty": {"repetition_penalty": 3.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "use_cache": {"use_cache": False},
    "returned dict": {"return_dict_in_generate": True, "output_scores": True},
    "returned dict of beams": {"return_dict_in_generate": True, "output_scores": True, "num_beams": 2},
}
REFUSED = ("inputs", "assistant_model", "negative_prompt_ids", "custom_generate")
ELSEWHERE = {
    "streamer": "test_a_streamer_gets_the_whole_prompt_first",
    "negative_prompt_attention_mask": "comes with negative_prompt_ids",
    "kwargs": "settings of generation, shown above",
}


def generated(model: Any, **arguments: Any) -> Any:
    arguments = {
        name: value() if inspect.isroutine(value) and value is not allowed else value
        for name, value in arguments.items()
    }
    set_seed(0)
    defaults = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": [COMMON], "pad_token_id": 3}
    if "generation_config" in arguments:
        del defaults["max_new_tokens"]
    return model.generate(**prompt(), **(defaults | arguments))


def models(pruning_ratio: float = 0.0, num_virtual_tokens: int = 0) -> tuple[Any, DualSpeedModel]:
    config = DualSpeedConfig(pruning_ratio=pruning_ratio, num_virtual_tokens=num_virtual_tokens)
    return tiny.llava().eval(), DualSpeedModel(tiny.llava(), config).eval()


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
        return
    assert type(found) is type(expected) and found.keys() == expected.keys()
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=1e-4)


def test_every_argument_of_stock_generation_has_a_row():
    names = set(inspect.signature(GenerationMixin.generate).parameters) - {"self"}
    assert names == {name for name in SHOWN if name in names} | set(REFUSED) | set(ELSEWHERE)


@pytest.mark.parametrize("name", SHOWN)
@pytest.mark.parametrize("mode", Mode)
def test_with_all_tokens_an_argument_does_what_it_does_in_stock_generation(name, mode):
    stock, ours = models()
    expected = generated(stock, **SHOWN[name])
    assert_same(generated(ours, mode=mode, **SHOWN[name]), expected)


@pytest.mark.parametrize("name", [name for name in SHOWN if name not in ("greedy", "use_cache", "synced_gpus")])
def test_a_row_shows_an_effect(name):
    stock, _ = models()
    plain, shown = generated(stock), generated(stock, **SHOWN[name])
    assert not (isinstance(shown, torch.Tensor) and plain.shape == shown.shape and torch.equal(plain, shown))


@pytest.mark.parametrize("name", SHOWN)
def test_on_pruned_tokens_the_caller_sees_the_whole_prompt(name):
    stock, ours = models(pruning_ratio=0.7, num_virtual_tokens=2)
    expected, found = (
        generated(model, **SHOWN[name], **mode) for model, mode in ((stock, {}), (ours, {"mode": "fast"}))
    )
    if not isinstance(expected, torch.Tensor):
        assert type(found) is type(expected)
        expected, found = expected.sequences, found.sequences
    assert found.shape[0] == expected.shape[0]
    copies = len(found) // 2
    assert torch.equal(found[:, :LENGTH], prompt()["input_ids"].repeat_interleave(copies, 0))
    if "max_length" in SHOWN[name] or "stopping" in name or "config" in name:
        assert found.shape == expected.shape


def test_processors_see_whole_sequences_on_pruned_tokens():
    _, ours = models(pruning_ratio=0.7, num_virtual_tokens=2)
    processor = Forbid()
    generated(ours, mode=Mode.FAST, logits_processor=LogitsProcessorList([processor]))
    assert processor.lengths == [LENGTH + step for step in range(NEW)]


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("pruning_ratio", [0.0, 0.7])
def test_a_streamer_gets_the_whole_prompt_first(mode, pruning_ratio):
    _, ours = models(pruning_ratio)
    one = {name: values[:1] for name, values in prompt().items()}
    streamer = Collect()
    sequence = ours.generate(**one, mode=mode, max_new_tokens=NEW, do_sample=False, streamer=streamer)
    assert streamer.values[0] == one["input_ids"].tolist()
    assert [token for value in streamer.values[1:] for token in value] == sequence[0, LENGTH:].tolist()
    assert streamer.ended


@pytest.mark.parametrize("name", [*REFUSED, "prompt_lookup_num_tokens"])
def test_what_reads_the_prompt_by_itself_is_refused_on_pruned_tokens(name):
    _, ours = models(pruning_ratio=0.7)
    with pytest.raises(ConfigError, match=f"^{name}: not with mode FAST, since .*valid: None, or mode SLOW"):
        ours.generate(**prompt(), mode=Mode.FAST, **{name: tiny.llava() if name == "assistant_model" else 3})


def test_a_max_length_that_the_prompt_already_has_is_refused():
    _, ours = models(pruning_ratio=0.7)
    with pytest.raises(ConfigError, match=f"max_length: {LENGTH} is no more than the prompt's {LENGTH} tokens"):
        ours.generate(**prompt(), mode=Mode.FAST, max_length=LENGTH)
