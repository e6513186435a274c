"""Sharding on CPUs, for tests: Python imports this at the start of each process that has this folder in PYTHONPATH.

accelerate shards on accelerators alone: on CPUs it stays with DistributedDataParallel, whatever its configuration asks
for. Here its state is told the strategy that was asked for, right after it is made. Nothing else is changed.

Environment variables:
    SHARDING_WITNESS: folder for `rank<N>.json`, which says how the model was sharded when accelerate had prepared it,
        and `ended<N>.json`, which says that the process had left the others when it ended.
    SHARDING_SPOILS: name of a function of this module, which is given the folder of each saved model, just before
        the processor is written to it.
"""

import atexit
import importlib.abc
import importlib.util
import json
import os
import sys
from pathlib import Path


def force_sharding(state) -> None:
    """Make `AcceleratorState` keep to the plugin that it is given, on CPUs too."""
    cls, kinds = state.AcceleratorState, state.DistributedType
    stock_init = cls.__init__

    def init(self, *args, **kwargs):
        is_new = cls._shared_state == {} or "_mixed_precision" not in cls._shared_state
        stock_init(self, *args, **kwargs)
        if not is_new:
            return
        if plugin := kwargs.get("fsdp_plugin"):
            self.distributed_type = kinds.FSDP
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = plugin
        elif plugin := kwargs.get("deepspeed_plugin"):
            self.distributed_type = kinds.DEEPSPEED
            plugin.set_mixed_precision(self._mixed_precision)
            plugin.select(_from_accelerator_state=True)
            self.deepspeed_plugins = plugin
            self._mixed_precision = "no"  # DeepSpeed's own settings say it
        state.PartialState._shared_state["distributed_type"] = self.distributed_type

    cls.__init__ = init


def watch_preparation(accelerator) -> None:
    """Write what `Accelerator.prepare` made of the model, for the test to assert."""
    stock = accelerator.Accelerator.prepare

    def prepare(self, *args, **kwargs):
        prepared = stock(self, *args, **kwargs)
        import torch

        for made in prepared if isinstance(prepared, (list, tuple)) else [prepared]:
            if isinstance(made, torch.nn.Module):
                write_witness(self, made)
        return prepared

    accelerator.Accelerator.prepare = prepare


def write_witness(accelerator, model) -> None:
    """Write kind of distribution, and how many parameters are in shards, to `rank<N>.json`."""
    from torch.distributed.tensor import DTensor

    parameters = list(model.parameters())
    zero = getattr(accelerator.state, "deepspeed_plugin", None)
    witness = {
        "distributed_type": accelerator.distributed_type.value,
        "wrapper": type(model).__name__,
        "num_parameters": len(parameters),
        "num_dtensors": sum(isinstance(parameter, DTensor) for parameter in parameters),
        "num_partitioned": sum(hasattr(parameter, "ds_tensor") for parameter in parameters),
        "zero_stage": zero.zero_stage if zero else None,
        "num_processes": accelerator.num_processes,
    }
    folder = Path(os.environ["SHARDING_WITNESS"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"rank{accelerator.process_index}.json").write_text(json.dumps(witness))
    atexit.register(write_end, folder / f"ended{accelerator.process_index}.json")


def write_end(path: Path) -> None:
    """Write whether this process, which ends, has left the others."""
    from torch import distributed

    path.write_text(json.dumps({"has_left": not distributed.is_initialized()}))


def watch_saving(processing) -> None:
    """Spoil a saved model before its processor is written, where SHARDING_SPOILS asks for it."""
    stock = processing.ProcessorMixin.save_pretrained

    def save_pretrained(self, folder, *args, **kwargs):
        if "checkpoint-" not in str(folder):
            globals()[os.environ["SHARDING_SPOILS"]](Path(folder))
        return stock(self, folder, *args, **kwargs)

    processing.ProcessorMixin.save_pretrained = save_pretrained


def delete_half(folder: Path) -> None:
    """Delete every second tensor of a saved model."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    kept = {name: weights[name] for name in sorted(weights)[::2]}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


HOOKS = {"accelerate.state": force_sharding}
if "SHARDING_WITNESS" in os.environ:
    HOOKS["accelerate.accelerator"] = watch_preparation
if "SHARDING_SPOILS" in os.environ:
    HOOKS["transformers.processing_utils"] = watch_saving


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls the function of HOOKS with a module once it is imported."""

    def find_spec(self, name, path=None, target=None):
        """Module's usual spec, with a loader that calls the hook afterwards; None for any other module."""
        if name not in HOOKS:
            return None
        hook = HOOKS.pop(name)
        spec = importlib.util.find_spec(name)
        stock = spec.loader.exec_module

        def exec_module(module):
            stock(module)
            hook(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, AfterImport())
