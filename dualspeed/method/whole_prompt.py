"""Generation's arguments and results in terms of the whole prompt, while the model reads a pruned one.

Lengths, processors, criteria and streamers mean what they mean to stock generation: they see every image placeholder.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import BaseStreamer

from dualspeed.errors import ConfigError

REFUSED = {
    "assistant_model": "its drafts are of the whole prompt",
    "prompt_lookup_num_tokens": "its drafts are of the whole prompt",
    "negative_prompt_ids": "it is read beside the whole prompt",
    "custom_generate": "it reads the prompt itself",
    "inputs": "the prompt is input_ids",
    "inputs_embeds": "the prompt is input_ids",
}
"""Arguments that generation on pruned tokens doesn't take, with the reason."""


@dataclass(frozen=True)
class WholePrompt:
    """A prompt with all its tokens, of which the model reads a shorter one."""

    input_ids: Tensor
    """(B, L) of the caller."""
    num_run: int
    """Length of the prompt that the model reads."""
    num_returned: int
    """How many of these stock generation returns: all, or none where the prompt enters as embeddings."""

    def restored(self, sequences: Tensor) -> Tensor:
        """(R, num_returned + new) ids from generation -> (R, L + new); R is a multiple of B."""
        prompts = self.input_ids.repeat_interleave(len(sequences) // len(self.input_ids), dim=0)
        return torch.cat([prompts, sequences[:, self.num_returned :]], dim=1)

    def result(self, output: Any) -> Any:
        """Result of stock generation, with whole sequences."""
        if isinstance(output, Tensor):
            return self.restored(output)
        output.sequences = self.restored(output.sequences)
        return output

    def arguments(self, given: dict[str, Any], defaults: GenerationConfig) -> dict[str, Any]:
        """Arguments for generation on the shorter prompt.

        Args:
            given: arguments in terms of the whole prompt.
            defaults: settings of generation that the model has.

        Raises:
            ConfigError: an argument that this generation doesn't take, or a length that the prompt already has.
        """
        for name, reason in REFUSED.items():
            if given.get(name) is not None:
                raise ConfigError(f"{name}: not with mode FAST, since {reason}; valid: None, or mode SLOW")
        arguments = given | self._lengths(given, given.get("generation_config") or defaults)
        if processors := given.get("logits_processor"):
            arguments["logits_processor"] = LogitsProcessorList([_Processor(self, one) for one in processors])
        if criteria := given.get("stopping_criteria"):
            arguments["stopping_criteria"] = StoppingCriteriaList([_Criterion(self, one) for one in criteria])
        if (allowed := given.get("prefix_allowed_tokens_fn")) is not None:
            arguments["prefix_allowed_tokens_fn"] = self._on_whole_row(allowed)
        if (streamer := given.get("streamer")) is not None:
            arguments["streamer"] = _Streamer(self, streamer)
        return arguments

    def _lengths(self, given: dict[str, Any], config: GenerationConfig) -> dict[str, int]:
        """Longest and shortest sequence, where they are given for the whole one."""
        lengths, num_given = {}, self.input_ids.shape[1]
        has_own = given.get("max_new_tokens") is not None or config.max_new_tokens is not None
        longest = given.get("max_length") or (None if has_own else config.max_length)
        if longest is not None:
            if longest <= num_given:
                raise ConfigError(f"max_length: {longest} is no more than the prompt's {num_given} tokens")
            lengths["max_length"] = longest - num_given + self.num_run
        shortest = given.get("min_length") or config.min_length
        if shortest:
            lengths["min_length"] = max(shortest - num_given + self.num_run, 0)
        return lengths

    def _on_whole_row(self, allowed: Callable[[int, Tensor], list[int]]) -> Callable[[int, Tensor], list[int]]:
        def on_whole(row: int, ids: Tensor) -> list[int]:
            return allowed(row, torch.cat([self.input_ids[row], ids[self.num_returned :]]))

        return on_whole


class _Processor(LogitsProcessor):
    """Processor of the caller, which sees whole sequences."""

    def __init__(self, prompt: WholePrompt, inner: Callable[..., Tensor]) -> None:
        self.prompt, self.inner = prompt, inner

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.inner(self.prompt.restored(input_ids), scores)


class _Criterion(StoppingCriteria):
    """Stopping criterion of the caller, which sees whole sequences."""

    def __init__(self, prompt: WholePrompt, inner: Callable[..., Tensor]) -> None:
        self.prompt, self.inner = prompt, inner

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return self.inner(self.prompt.restored(input_ids), scores, **kwargs)


class _Streamer(BaseStreamer):
    """Streamer of the caller, which gets the whole prompt first."""

    def __init__(self, prompt: WholePrompt, inner: BaseStreamer) -> None:
        self.prompt, self.inner = prompt, inner
        self.is_first = True

    def put(self, value: Tensor) -> None:
        """Hand on new tokens, and first of all the whole prompt."""
        self.inner.put(self.prompt.input_ids.cpu() if self.is_first else value)
        self.is_first = False

    def end(self) -> None:
        """Hand on the end."""
        self.inner.end()
