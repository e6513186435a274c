"""Greedy generation of answers in batches; an answer doesn't depend on the other questions of its batch."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import AutoProcessor

from dualspeed.benchmarks import Question
from dualspeed.data.collator import generation_inputs
from dualspeed.device import best_device
from dualspeed.method.checkpoint import load_vlm, read_method_settings
from dualspeed.method.isolator import ISOLATOR_FILE
from dualspeed.method.model import DualSpeedModel
from dualspeed.settings.method import DualSpeedConfig
from dualspeed.settings.modes import Mode


class AnswerGenerator:
    """A trained model that answers on full tokens (the stock model) or on pruned ones with the mode isolator.

    Args:
        model_folder: checkpoint folder, with its processor.
        max_new_tokens: longest answer, in tokens.
        pruner: pruner of pruned inference; None: full tokens.
        pruning_ratio: its ratio; None: full tokens.
        dtype: dtype of the weights; None: the checkpoint's.
    """

    def __init__(
        self,
        model_folder: Path,
        max_new_tokens: int,
        pruner: str | None = None,
        pruning_ratio: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.processor = AutoProcessor.from_pretrained(model_folder)
        device = best_device()
        self.question_tokenizer = None
        if pruner is None or pruning_ratio is None:
            vlm = load_vlm(model_folder)
            self.generate = vlm.to(device, dtype).eval().generate
        else:
            config = pruned_config(model_folder, pruner, pruning_ratio)
            model = DualSpeedModel.from_pretrained(model_folder, config).to(device, dtype).eval()
            self.question_tokenizer = model.question_tokenizer(self.processor)
            vlm, self.generate = model.vlm, lambda **inputs: model.generate(mode=Mode.FAST, **inputs)
        self.device, self.dtype = vlm.device, vlm.dtype
        eos = vlm.generation_config.eos_token_id
        self.eos_token_ids = eos if isinstance(eos, list) else [eos]
        self.max_new_tokens = max_new_tokens

    def make_batches(
        self, questions: Sequence[Question], image_sizes: Mapping[Path, tuple[int, int]], batch_size: int
    ) -> list[list[Question]]:
        """Batches of questions of similar length, by image size and then by prompt, so that little is padded."""
        tokens = self.processor.tokenizer([question.prompt for question in questions]).input_ids
        keys = [
            (image_sizes[question.image] if question.image else (0, 0), len(row))
            for question, row in zip(questions, tokens, strict=True)
        ]
        # Longest first, so that a batch which doesn't fit into memory fails at once.
        order = sorted(range(len(questions)), key=keys.__getitem__, reverse=True)
        return [
            [questions[index] for index in order[start : start + batch_size]]
            for start in range(0, len(order), batch_size)
        ]

    @torch.no_grad()
    def answer(self, questions: Sequence[Question]) -> tuple[list[str], int]:
        """Answers to one batch, and the number of tokens generated for them."""
        examples = [{"image": question.image, "prompt": question.prompt} for question in questions]
        inputs = generation_inputs(self.processor, examples, question_tokenizer=self.question_tokenizer)
        inputs = inputs.to(self.device, dtype=self.dtype)
        output = self.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            max_new_tokens=self.max_new_tokens,
            pad_token_id=self.processor.tokenizer.pad_token_id,
        )
        rows = [self._cut(row) for row in output[:, inputs["input_ids"].shape[1] :].tolist()]
        texts = self.processor.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [text.strip() for text in texts], sum(map(len, rows))

    def _cut(self, tokens: list[int]) -> list[int]:
        """Tokens up to the first end of sequence; padding up to the batch's longest answer follows it."""
        ends = [position for position, token in enumerate(tokens) if token in self.eos_token_ids]
        return tokens[: ends[0] + 1] if ends else tokens


def pruned_config(model_folder: Path, pruner: str, pruning_ratio: float) -> DualSpeedConfig:
    """Settings of pruned inference: those of the checkpoint with this pruner and ratio.

    There is no isolator if none was trained: in a stock checkpoint, and in one trained on full tokens alone.
    """
    config = read_method_settings(model_folder) or DualSpeedConfig()
    config = dataclasses.replace(config, pruner=pruner, pruning_ratio=pruning_ratio)
    if config.slow_mode_ratio == 1 or not (Path(model_folder) / ISOLATOR_FILE).exists():
        config = dataclasses.replace(config, num_virtual_tokens=0)
    return config
