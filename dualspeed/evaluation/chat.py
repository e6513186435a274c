"""Answer of a trained model to one prompt about a picture, printed while it is made."""

from pathlib import Path

import torch
from transformers import TextStreamer

from dualspeed.data.collator import generation_inputs
from dualspeed.errors import DualSpeedError, ModelError
from dualspeed.evaluation.generator import AnswerGenerator
from dualspeed.method.checkpoint import read_method_settings
from dualspeed.settings.method import DualSpeedConfig
from dualspeed.settings.modes import Mode


@torch.no_grad()
def stream_answer(folder: Path, image: Path | None, prompt: str, mode: Mode, max_new_tokens: int) -> None:
    """Print the greedy answer to a prompt, word by word.

    Args:
        folder: checkpoint folder, with its processor.
        mode: SLOW reads all tokens, as the stock model; FAST pruned ones, by the settings that the checkpoint was
            trained with.

    Raises:
        ModelError, ImageError: the model or the image can't be read.
    """
    config = (read_method_settings(folder) or DualSpeedConfig()) if mode is Mode.FAST else None
    pruning = (None, None) if config is None else (config.pruner, config.pruning_ratio)
    try:
        generator = AnswerGenerator(folder, max_new_tokens, *pruning)
    except DualSpeedError:
        raise
    except Exception as error:  # of any kind: transformers raises a dozen for what isn't there
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"--model {folder}: can't be loaded: {first}") from error
    processor, question_tokenizer = generator.processor, generator.question_tokenizer
    inputs = generation_inputs(processor, [{"image": image, "prompt": prompt}], question_tokenizer=question_tokenizer)
    generator.generate(
        **inputs.to(generator.device, dtype=generator.dtype),
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        pad_token_id=processor.tokenizer.pad_token_id,
        streamer=TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
