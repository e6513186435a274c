"""Checkpoints: a stock one of the VLM, beside it the isolator and the method's settings, which other software ignores.

Folder of a checkpoint: what `vlm.save_pretrained` writes, ISOLATOR_FILE if there is an isolator, METHOD_FILE, and
`adapter/` if the model is trained by LoRA (dualspeed.method.adapters).
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.integrations import deepspeed

from dualspeed.errors import ConfigError, IncompleteModelError, ModelError
from dualspeed.files import write_json
from dualspeed.layout import METHOD_FILE
from dualspeed.method.isolator import ISOLATOR_FILE, ModeIsolator
from dualspeed.settings.identity import record
from dualspeed.settings.method import DualSpeedConfig
from dualspeed.settings.reading import read_dataclass

if TYPE_CHECKING:
    from dualspeed.method.model import DualSpeedModel

ISOLATOR_KEY = "mode_isolator.weight"
VLM_PREFIX = "vlm."


def load_vlm(path: str | Path, attn_implementation: str | None = None, **kwargs: Any) -> PreTrainedModel:
    """Load a stock checkpoint; ModelError if a weight is missing, unexpected or of another shape.

    Args:
        attn_implementation: of the language model alone, for the tower keeps its own; None: transformers' choice.
        kwargs: for `from_pretrained`.

    Raises:
        ConfigError: the attention isn't installed, or the model has none of that kind.
    """
    if attn_implementation is not None:
        kwargs["attn_implementation"] = {"text_config": attn_implementation}
    try:
        vlm, report = AutoModelForImageTextToText.from_pretrained(path, output_loading_info=True, **kwargs)
    except (ImportError, ValueError) as error:
        if attn_implementation is None:
            raise
        line = str(error).strip().splitlines()[0].rstrip(".")
        raise ConfigError(f"attn_implementation: {attn_implementation!r}: {line}; valid: what is installed") from error
    wrong = {problem: sorted(map(str, keys)) for problem, keys in report.items() if keys}
    if wrong:
        raise ModelError(f"{path}: the weights don't fit {type(vlm).__name__}: {wrong}")
    return vlm


def read_method_settings(folder: str | Path) -> DualSpeedConfig | None:
    """Settings of the method that a checkpoint was saved with; None for a stock checkpoint."""
    file = Path(folder) / METHOD_FILE
    if not file.exists():
        return None
    return read_dataclass(DualSpeedConfig, json.loads(file.read_text(encoding="utf-8")), str(file))


def check_isolator(folder: str | Path, config: DualSpeedConfig) -> None:
    """Raise ModelError if a folder that was saved with these settings has lost its isolator.

    Random vectors would take its place.
    """
    if config.num_virtual_tokens and not (Path(folder) / ISOLATOR_FILE).exists():
        raise ModelError(
            f"{folder}: {ISOLATOR_FILE} is missing, which by {METHOD_FILE} was saved; valid: the whole folder, "
            f"or a stock checkpoint without {METHOD_FILE}"
        )


def save_checkpoint(
    model: "DualSpeedModel",
    folder: str | Path,
    state_dict: dict[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    merged: bool = True,
) -> None:
    """Write a checkpoint; the arguments are those of `DualSpeedModel.save_pretrained`."""
    state_dict = model.state_dict() if state_dict is None else state_dict
    if dtype is not None:
        state_dict = {key: value.to(dtype) for key, value in state_dict.items()}
    weights = {key.removeprefix(VLM_PREFIX): value for key, value in state_dict.items() if key.startswith(VLM_PREFIX)}
    if model.has_adapters:
        from dualspeed.method import adapters  # needs peft

        if merged:  # first, so that a save that is cut off leaves no folder with adapters alone
            adapters.save_merged(model.vlm, weights, folder)
        adapters.save_adapters(model.vlm, weights, Path(folder) / adapters.ADAPTER_FOLDER)
    else:
        model.vlm.save_pretrained(folder, state_dict=weights)
    if model.mode_isolator is not None:
        isolator = state_dict[ISOLATOR_KEY].detach().contiguous().cpu()
        save_file({ISOLATOR_KEY: isolator}, Path(folder) / ISOLATOR_FILE, metadata={"format": "pt"})
    if dtype is not None:
        # save_pretrained wrote the dtype that training holds the weights in.
        model.vlm.config.dtype = dtype
        model.vlm.config.save_pretrained(folder)
    write_json(Path(folder) / METHOD_FILE, record(model.dualspeed))


def load_isolator(isolator: ModeIsolator | None, folder: str | Path) -> bool:
    """Copy a checkpoint's isolator into `isolator`; False if either of them is missing.

    Raises:
        ModelError: the saved isolator has another shape.
    """
    file = Path(folder) / ISOLATOR_FILE
    if isolator is None or not file.exists():
        return False
    saved = load_file(file)[ISOLATOR_KEY]
    if saved.shape != isolator.weight.shape:
        raise ModelError(
            f"{file}: isolator of shape {tuple(saved.shape)}, but num_virtual_tokens and the model's width ask for "
            f"{tuple(isolator.weight.shape)}"
        )
    with torch.no_grad():
        isolator.weight.copy_(saved)
    return True


def check_checkpoint(model: "DualSpeedModel", folder: str | Path) -> None:
    """Load what `save_checkpoint` wrote, merged, and compare it with the model, whose parameters may be in shards.

    Raises:
        IncompleteModelError: a weight is missing, unexpected, of another shape or not finite, or a file can't be read.
    """
    folder = Path(folder)
    try:
        with whole_loading():
            saved = load_vlm(folder, dtype="auto")
        check_weights(str(folder), dict(saved.named_parameters()), stock_shapes(model.vlm))
        del saved
        if model.mode_isolator is not None:
            file = folder / ISOLATOR_FILE
            check_weights(str(file), load_file(file), {ISOLATOR_KEY: whole_shape(model.mode_isolator.weight)})
        if model.has_adapters:
            from dualspeed.method import adapters  # needs peft

            for name, shapes in adapters.saved_shapes(model.vlm).items():
                file = folder / adapters.ADAPTER_FOLDER / name
                check_weights(str(file), load_file(file), shapes)
        if read_method_settings(folder) != model.dualspeed:
            raise IncompleteModelError(f"{folder / METHOD_FILE}: missing, or not this model's settings")
    except IncompleteModelError:
        raise
    except Exception as error:  # transformers, safetensors and json raise a dozen kinds for a missing or torn file
        raise IncompleteModelError(f"{folder}: {str(error).strip().splitlines()[0] or type(error).__name__}") from error


def check_weights(place: str, weights: Mapping[str, Tensor], shapes: Mapping[str, torch.Size | None]) -> None:
    """Raise IncompleteModelError unless the weights have exactly these names and shapes (None: any), and are finite."""
    problems = [f"{name} is missing" for name in shapes if name not in weights]
    problems += [f"{name} doesn't belong to it" for name in weights if name not in shapes]
    for name, shape in shapes.items():
        if name in weights and shape is not None and weights[name].shape != shape:
            problems.append(f"{name} has shape {tuple(weights[name].shape)}, not {tuple(shape)}")
        elif name in weights and not torch.isfinite(weights[name]).all():
            problems.append(f"{name} is not finite")
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise IncompleteModelError(f"{place}: {problems[0]}{more}")


def stock_shapes(vlm: PreTrainedModel) -> dict[str, torch.Size | None]:
    """Name -> shape of the parameters of the stock model that a trained one is saved as; None: not known."""
    # 4-bit weights have shapes of their own.
    is_quantized = getattr(vlm.config, "quantization_config", None) is not None
    return {
        name.replace(".base_layer.", "."): None if is_quantized else whole_shape(parameter)
        for name, parameter in vlm.named_parameters()
        if ".lora_" not in name
    }


def whole_shape(parameter: Tensor) -> torch.Size:
    """Shape of a parameter over all ranks; ZeRO-3 empties the parameter and notes its shape beside it."""
    return getattr(parameter, "ds_shape", parameter.shape)


@contextmanager
def whole_loading() -> Iterator[None]:
    """Load models whole inside the context: under ZeRO-3, transformers would share each among all ranks."""
    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference
