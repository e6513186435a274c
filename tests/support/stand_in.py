"""A stand-in accelerator for machines without one: device type `stand_in`, computed by the CPU.

Each tensor on it holds a CPU tensor, and every operation runs on those, so that losses and gradients are the CPU's, to
the last bit where the CPU's attention is computed like the stand-in's (`torch.nn.attention.sdpa_kernel`, MATH). Like a
GPU it refuses to mix its tensors with the CPU's, and it notes where the host waits for it (`host_syncs`). Built on
torch's Python backend for PrivateUse1 (torch.utils.backend_registration).

It is unavailable to `torch.accelerator` until `stand_in()` or `host_syncs()` is entered, or STAND_IN=1 is in the
environment, so that importing this module changes no other test of the process.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from tests.support.paths import REPOSITORY

NAME = "stand_in"
TORCH = str(Path(torch.__file__).parent) + os.sep
SHAPE_FROM_VALUES = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
"""Operations whose result, or its shape, the host must know. `masked_scatter` is none: it runs on the device alone."""
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
COPIES = {"copy_", "_copy_from", "_to_copy", "set_"}


@dataclass(frozen=True)
class Sync:
    """One wait of the host for the device."""

    operation: str
    """Name of torch's operation, as in "_local_scalar_dense" (item) or "_to_copy" (cpu, tolist)."""
    file: str
    """File of the innermost frame outside torch, relative to the repository where it lies there; in a backward pass,
    that of whoever called `backward`."""
    line: int

    @property
    def is_ours(self) -> bool:
        """True if a line of `dualspeed/` caused it."""
        return self.file.startswith("dualspeed" + os.sep)

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.operation}"


class State:
    """Switches of the stand-in, the same in all threads of the process."""

    is_available = os.environ.get("STAND_IN") == "1"
    syncs: list[Sync] | None = None
    uploads: list[Sync] | None = None


class Syncs(list[Sync]):
    """Waits in the order in which they happened."""

    def __init__(self) -> None:
        super().__init__()
        self.uploads: list[Sync] = []
        """Copies to the device that aren't `non_blocking`: on CUDA the host waits for them too."""

    def ours(self) -> list[str]:
        """Waits that lines of `dualspeed/` caused."""
        return [str(sync) for sync in self if sync.is_ours]

    def others(self) -> list[str]:
        """All other waits: those of transformers' own code, and of backward passes."""
        return [str(sync) for sync in self if not sync.is_ours]


@contextmanager
def stand_in() -> Iterator[torch.device]:
    """Make the stand-in available to `torch.accelerator` while the context is open; yields its device.

    Modules that are moved to it meanwhile keep their tied weights tied, as on a GPU.
    """
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    before, State.is_available = State.is_available, True
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield torch.device(NAME, 0)
    finally:
        State.is_available = before
        torch.__future__.set_swap_module_params_on_conversion(swaps)


@contextmanager
def host_syncs() -> Iterator[Syncs]:
    """Collect each wait of the host for the stand-in while the context is open."""
    before, found = (State.syncs, State.uploads), Syncs()
    State.syncs, State.uploads = found, found.uploads
    try:
        with stand_in():
            yield found
    finally:
        State.syncs, State.uploads = before


def note(record: list[Sync] | None, operation: str) -> None:
    """Add a wait, with the innermost frame outside torch and outside this file, to a record that is open."""
    if record is None:
        return
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((TORCH, __file__, "<frozen")):
        frame = frame.f_back
    path = "" if frame is None else frame.f_code.co_filename.removeprefix(f"{REPOSITORY}{os.sep}")
    record.append(Sync(operation, path.split(f"site-packages{os.sep}")[-1], 0 if frame is None else frame.f_lineno))


class StandInTensor(torch.Tensor):
    """Tensor on the stand-in: the shape and dtype of the CPU tensor that it holds in `held`."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "StandInTensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    def __repr__(self) -> str:
        return f"{self.held!r} on {NAME}"

    def tolist(self) -> Any:
        """Values in lists, by a copy to the host; torch's own refuses subclasses."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(operation, args, kwargs or {})


def compute(operation: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run one operation on the held tensors, refusing mixed devices and noting waits."""
    name = operation._schema.name.split("::")[1]
    leaves, structure = tree_flatten((args, kwargs))
    ours = [leaf for leaf in leaves if isinstance(leaf, StandInTensor)]
    refuse_mixed(name, args, leaves)
    target = kwargs.get("device")
    leaves_device = target is not None and torch.device(target).type == "cpu"
    if waits(name, args, kwargs) or (leaves_device and name == "_to_copy"):
        note(State.syncs, name)
    if is_upload(name, args, kwargs):
        note(State.uploads, name)
    inner_args, inner_kwargs = tree_unflatten([on_cpu(leaf) for leaf in leaves], structure)
    with torch.no_grad():
        result = operation(*inner_args, **inner_kwargs)
    if leaves_device or name == "_local_scalar_dense":
        return result
    # An operation in place returns the tensor that it was given.
    known = {id(tensor.held): tensor for tensor in ours} | {
        id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, StandInTensor)
    }
    for tensor in ours:
        if tensor.shape != tensor.held.shape:
            raise NotImplementedError(f"{name} changed the shape of a tensor in place, which {NAME} doesn't know")
    return tree_map(lambda value: wrapped(value, known) if isinstance(value, Tensor) else value, result)


def wrapped(tensor: Tensor, known: dict[int, Tensor]) -> Tensor:
    """Tensor on the stand-in that holds `tensor`, an existing one if there is one."""
    return known[id(tensor)] if id(tensor) in known else StandInTensor(tensor)


def on_cpu(value: Any) -> Any:
    """Argument of an operation as the CPU takes it."""
    if isinstance(value, StandInTensor):
        return value.held
    return torch.device("cpu") if isinstance(value, torch.device) else value


def refuse_mixed(name: str, args: tuple, leaves: list[Any]) -> None:
    """Raise RuntimeError, as CUDA does, if an operation mixes the CPU's tensors with the stand-in's.

    Allowed are copies, scalars (tensors without dimensions), and indices on the CPU.
    """
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if name in INDEXED:
        if not isinstance(args[0], StandInTensor):
            raise RuntimeError(f"{name}: indices should be on the indexed tensor's device, cpu, but are on {NAME}")
        tensors = [value for value in (args[0], *args[2:]) if isinstance(value, Tensor)]
    mixed = [tensor for tensor in tensors if not isinstance(tensor, StandInTensor) and tensor.dim() > 0]
    if mixed and name not in COPIES:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found {NAME}:0 and cpu")


def waits(name: str, args: tuple, kwargs: dict[str, Any]) -> bool:
    """True if the host waits for values, for a size that depends on values, or for a copy to itself."""
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    if name in INDEXED:
        indices = [index for index in args[1] if index is not None]
        by_mask = any(index.dtype in (torch.bool, torch.uint8) for index in tree_leaves(indices))
        is_fill = name != "index" and len(indices) == 1 and args[2].numel() == 1 and not any(args[3:4])
        return by_mask and not is_fill  # CUDA fills with one value on the device, without counting
    if name == "copy_":
        return isinstance(args[1], StandInTensor) and not isinstance(args[0], StandInTensor)
    return name in SHAPE_FROM_VALUES


def is_upload(name: str, args: tuple, kwargs: dict[str, Any]) -> bool:
    """True for a copy from host to device that isn't `non_blocking`."""
    is_copy = name == "copy_" and isinstance(args[0], StandInTensor) and not isinstance(args[1], StandInTensor)
    return is_copy and not (kwargs.get("non_blocking") or any(args[2:3]))


class DeviceModule:
    """Module that torch finds as `torch.stand_in`."""

    def is_available(self) -> bool:
        return State.is_available

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return int(State.is_available)

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        """Nothing to do: there is one device."""

    def synchronize(self, device: Any = None) -> None:
        """Nothing to wait for: operations are done when they return."""

    def manual_seed(self, seed: int) -> None:
        """Nothing to do: the stand-in draws from the CPU's generator."""

    manual_seed_all = manual_seed

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_device_name(self, device: Any = None) -> str:
        return "stand-in"

    def is_bf16_supported(self) -> bool:
        return True

    def empty_cache(self) -> None:
        """Nothing is cached."""


def made_here(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Turn a function that makes a CPU tensor into one that makes a tensor here."""

    def made(*args: Any, dtype: Any = None, layout: Any = None, device: Any = None, **rest: Any) -> Tensor:
        return StandInTensor(make(*args, dtype=dtype))

    return made


def copy_between(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy the values of a tensor to one on the other device."""
    if isinstance(target, StandInTensor) and not non_blocking and not isinstance(source, StandInTensor):
        note(State.uploads, "copy_")
    elif not isinstance(target, StandInTensor):
        note(State.syncs, "copy_")
    with torch.no_grad():
        on_cpu(target).copy_(on_cpu(source))
    return target


def to_scalar(tensor: Tensor) -> Any:
    """Value of a tensor of one element."""
    note(State.syncs, "_local_scalar_dense")
    return on_cpu(tensor).item()


def register() -> torch.library.Library:
    """Give PrivateUse1 its name, its module, and kernels for what has no tensor to dispatch on.

    Backward passes run in the caller's thread, so that their waits name the caller, and so that no thread of torch's
    needs Python while the process ends.
    """
    torch.autograd.set_multithreading_enabled(False)
    _setup_privateuseone_for_python_backend(NAME, backend_module=DeviceModule())
    library = torch.library.Library("aten", "IMPL")
    makers = {"empty.memory_format": torch.empty, "empty_strided": torch.empty_strided}
    makers |= {f"arange{variant}": torch.arange for variant in ("", ".start", ".start_step")}
    makers |= {"linspace": torch.linspace, "randperm": torch.randperm, "eye": torch.eye}
    for name, make in makers.items():
        library.impl(name, made_here(make), "PrivateUse1")
    library.impl("_copy_from", copy_between, "PrivateUse1")
    library.impl("_local_scalar_dense", to_scalar, "PrivateUse1")
    return library


LIBRARY = register()
"""Kept alive, since torch forgets the kernels of a library that is gone."""
