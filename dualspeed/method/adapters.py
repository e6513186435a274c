"""LoRA (arXiv 2106.09685) and QLoRA (arXiv 2305.14314) by peft: adapters on linear layers.

Adapters that peft made itself (`get_peft_model`, `add_adapter`) are taken as they are. `add_adapters` puts them on the
linear layers of the language model: embeddings and head stay frozen, tied or not; projector and isolator are trained in
full, the vision tower is frozen. In a mixture of experts, the experts (one parameter for all of a layer) and the router
that chooses among them stay frozen too, whatever the family; shared experts, which every token passes, are linear
layers. An adapter for each expert would multiply the adapters' size by the number of experts, and peft gives such
adapters no dropout.

A checkpoint is a stock one with the adapters merged in. Beside it, `adapter/` holds the adapter in peft's format and
the other trained weights, from which training resumes exactly. A checkpoint written during training has `adapter/`
only.
"""

import copy
import logging
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedModel

from dualspeed.errors import ConfigError
from dualspeed.method.vlm.parts import language_parameters
from dualspeed.settings.recipe import LoraRecipe

ADAPTER_FOLDER = "adapter"
ADAPTER_FILE = "adapter_model.safetensors"
PROJECTOR_FILE = "projector.safetensors"
NAME = "default"
PEFT_PREFIX = "base_model.model."
PLAIN = {"bias": "none", "use_dora": False, "lora_bias": False, "modules_to_save": None}
PLAIN |= {"trainable_token_indices": None, "layer_replication": None, "alora_invocation_tokens": None}
"""Fields of LoraConfig whose other values train what is no product of two matrices -> the value that does."""

logger = logging.getLogger(__name__)


def without_peft(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """VLM of a model with adapters, in which they stay; ConfigError for adapters that can't be merged into it."""
    check_adapters(model.peft_config)
    vlm = model.get_base_model() if isinstance(model, PeftModel) else model
    for name, layer in adapter_layers(vlm).items():
        if not is_linear(layer.get_base_layer()):
            kind = type(layer.get_base_layer()).__name__
            raise ConfigError(f"adapters: {name} is {kind}; valid: target_modules that are linear layers")
    logger.info(
        "LoRA on %d layers is trained; save_model writes the merged model, and %s/ beside it",
        len(adapter_layers(vlm)),
        ADAPTER_FOLDER,
    )
    return vlm


def check_adapters(configs: dict[str, PeftConfig]) -> None:
    """Raise ConfigError unless there is one adapter, and it is LoRA that adds products of two matrices alone."""
    if len(configs) != 1:
        raise ConfigError(f"adapters: {len(configs)} of them ({', '.join(configs)}), but one is trained; valid: one")
    (config,) = configs.values()
    if not isinstance(config, LoraConfig) or str(config.peft_type.value) != "LORA":
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        raise ConfigError(f"adapters: {kind} can't be merged into a stock checkpoint here; valid: peft.LoraConfig")
    if parameters := sorted(config.target_parameters or ()):
        raise ConfigError(
            f"adapters: peft would adapt {', '.join(parameters)} as parameters, as it adapts experts, which isn't "
            "merged; valid: target_modules without the names that peft gives to experts, or dualspeed.add_adapters, "
            "which adapts every linear layer of the language model"
        )
    for field, plain in PLAIN.items():
        value = getattr(config, field, plain)
        if value != plain and value:
            raise ConfigError(f"adapters: LoraConfig.{field} is {value!r}, which isn't merged; valid: {plain!r}")


def adapter_name(vlm: PreTrainedModel) -> str:
    """Name of the model's adapter."""
    (name,) = vlm.peft_config
    return name


def quantization(lora: LoraRecipe | None) -> dict[str, Any]:
    """Arguments of from_pretrained for QLoRA: 4-bit NormalFloat, double quantisation, bfloat16 arithmetic; else {}."""
    if lora is None or not lora.quantize:
        return {}
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": config, "dtype": torch.bfloat16}


def add_adapters(vlm: PreTrainedModel, lora: LoraRecipe) -> None:
    """Freeze the language model and add an adapter to each of its linear layers; other parameters keep their state."""
    language = language_parameters(vlm)
    heads = [module.get_output_embeddings() for module in vlm.modules() if isinstance(module, PreTrainedModel)]
    trainable = [parameter for parameter in vlm.parameters() if parameter.requires_grad and parameter not in language]
    layers = [
        name
        for name, module in vlm.named_modules()
        if is_linear(module) and module.weight in language and not any(module is head for head in heads)
    ]
    named = sorted(set(layers) - read_as_experts(vlm, layers))
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=named, bias="none"
    )
    keys = {f"{name}.lora_A.weight": torch.empty(0) for name in layers}  # say which layers; peft reads no values
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "While injecting the PEFT adapters, an inconsistency", RuntimeWarning)
        inject_adapter_in_model(config, vlm, NAME, state_dict=keys)
    vlm._hf_peft_config_loaded = True  # as `vlm.add_adapter` notes it: a quantised model may then be trained
    for parameter in trainable:
        parameter.requires_grad_(True)


def is_linear(module: nn.Module) -> bool:
    """True for a linear layer, quantised or not.

    A router may be a subclass whose forward returns more than a product, to which nothing can be added.
    """
    kind = type(module)
    own = kind.forward is nn.Linear.forward or kind.__module__.startswith("bitsandbytes.")
    return isinstance(module, nn.Linear) and own


def read_as_experts(vlm: PreTrainedModel, layers: Iterable[str]) -> set[str]:
    """Names of linear layers that peft reads as those of experts, since experts had such names before version 5.

    A configuration that names one adapts the experts, which transformers 5 holds in one parameter, instead of it.
    """
    layers = set(layers)
    config = LoraConfig(target_modules=sorted(layers))
    convert_peft_config_for_transformers(config, vlm, None)
    return layers - set(config.target_modules)


def adapter_layers(vlm: PreTrainedModel) -> dict[str, LoraLayer]:
    """Layers with an adapter, by name; empty for a model without adapters."""
    return {name: module for name, module in vlm.named_modules() if isinstance(module, LoraLayer)}


def save_merged(vlm: PreTrainedModel, weights: dict[str, Tensor], folder: str | Path) -> None:
    """Write a stock checkpoint with the adapters merged into their layers.

    Args:
        weights: full state dict of the model.
    """
    stock = vlm
    if is_quantized(vlm):
        # Adapters can't be added to 4-bit weights, only to the weights that these were made from.
        stock = AutoModelForImageTextToText.from_pretrained(vlm.name_or_path, dtype=torch.bfloat16)
    state = merged(vlm, weights, stock.state_dict() if is_quantized(vlm) else {})
    noted = stock._hf_peft_config_loaded
    stock._hf_peft_config_loaded = False  # else transformers would write the adapters alone
    try:
        stock.save_pretrained(folder, state_dict=state)
    finally:
        stock._hf_peft_config_loaded = noted
    logger.info(
        "%s: the stock model with its adapters merged in; %s/ has them in peft's format", folder, ADAPTER_FOLDER
    )


def is_quantized(vlm: PreTrainedModel) -> bool:
    """True if the model's layers are quantised (QLoRA)."""
    return getattr(vlm.config, "quantization_config", None) is not None


def merged(vlm: PreTrainedModel, weights: dict[str, Tensor], unquantized: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the stock model: each layer plus the product of its adapter (paper, section 4.1).

    Args:
        weights: full state dict of the model, adapters included.
        unquantized: weights of the stock model if those of `vlm` are quantised, else {}.
    """
    weights, adapter = dict(weights), adapter_name(vlm)
    for name, layer in adapter_layers(vlm).items():
        down, up = (weights.pop(f"{name}.lora_{side}.{adapter}.weight").float() for side in "AB")
        own = {key.replace(".base_layer", ""): weights.pop(key) for key in list(weights) if is_base_of(name, key)}
        own = {key: unquantized.get(key, value) for key, value in own.items() if key in unquantized or not unquantized}
        product = layer.scaling[adapter] * up @ down
        before = own[f"{name}.weight"]
        own[f"{name}.weight"] = (before.float() + product.to(before.device)).to(before.dtype)
        weights |= own
    return weights


def is_base_of(name: str, key: str) -> bool:
    """True if `key` names a weight of the layer `name` itself, not of its adapter."""
    return key.startswith(f"{name}.base_layer.")


def peft_key(name: str, adapter: str) -> str:
    """Name in peft's files of a weight of an adapter, whose own name isn't part of it."""
    layer, _, kind = name.rpartition(".lora_")
    return f"{PEFT_PREFIX}{layer}.lora_{kind.replace(f'.{adapter}.', '.', 1)}"


def saved_shapes(vlm: PreTrainedModel) -> dict[str, dict[str, torch.Size]]:
    """Name of each file of `save_adapters` -> name and shape of the weights in it."""
    shapes: dict[str, dict[str, torch.Size]] = {ADAPTER_FILE: {}, PROJECTOR_FILE: {}}
    for name, parameter in vlm.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 empties the parameter itself
        if ".lora_" in name:
            shapes[ADAPTER_FILE][peft_key(name, adapter_name(vlm))] = shape
        elif parameter.requires_grad:
            shapes[PROJECTOR_FILE][name] = shape
    return shapes


def save_adapters(vlm: PreTrainedModel, weights: dict[str, Tensor], folder: Path) -> None:
    """Write the adapter in the format of `PeftModel.from_pretrained`, and the other trainable weights beside it.

    Args:
        weights: full state dict of the model.
    """
    trained = {name for name, parameter in vlm.named_parameters() if parameter.requires_grad and ".lora_" not in name}
    folder.mkdir(parents=True, exist_ok=True)
    adapter = adapter_name(vlm)
    adapters = {peft_key(key, adapter): value.contiguous().cpu() for key, value in weights.items() if ".lora_" in key}
    save_file(adapters, folder / ADAPTER_FILE, metadata={"format": "pt"})
    loadable_config(vlm).save_pretrained(str(folder))
    save_file({key: weights[key].contiguous().cpu() for key in sorted(trained)}, folder / PROJECTOR_FILE)


def loadable_config(vlm: PreTrainedModel) -> PeftConfig:
    """Configuration with which peft puts the saved adapter on the layers that were trained.

    A layer that peft would read as experts is named by its weight. Peft gives an adapter of a weight no dropout, so
    that this configuration has none at all.
    """
    config = vlm.peft_config[adapter_name(vlm)]
    experts = read_as_experts(vlm, adapter_layers(vlm))
    if experts:
        config = copy.copy(config)
        config.target_parameters, config.lora_dropout = sorted(f"{name}.weight" for name in experts), 0.0
    return config


def load_adapters(vlm: PreTrainedModel, folder: Path) -> None:
    """Load adapters and projector from a folder of `save_adapters`; KeyError if they are another model's."""
    state = load_file(folder / PROJECTOR_FILE)
    for key, value in load_file(folder / ADAPTER_FILE).items():
        layer, _, kind = key.removeprefix(PEFT_PREFIX).rpartition(".lora_")
        state[f"{layer}.lora_{kind.replace('.', f'.{adapter_name(vlm)}.', 1)}"] = value
    parameters = dict(vlm.named_parameters())
    with torch.no_grad():
        for name, value in state.items():
            parameters[name].copy_(value)
