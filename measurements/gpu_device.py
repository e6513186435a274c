"""Questions that measurements/gpu.py asks the device: times, memory, name, peak rate, precision."""

import os
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path

import torch
import transformers

from dualspeed.device import machine, synchronize

DATA_SHEET = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12}
"""Dense bfloat16 FLOPs a second by a part of the device's name, the special names first (NVIDIA's data sheets)."""


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, including the work that it leaves queued on the device."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def counts_memory(device: torch.device) -> bool:
    """True if the device counts the memory that torch has allocated on it."""
    return hasattr(torch.get_device_module(device), "max_memory_allocated") and device.type != "cpu"


def start_peak(device: torch.device) -> int:
    """Forget the peak of allocated memory so far; returns the bytes that are allocated now."""
    module = torch.get_device_module(device)
    module.reset_peak_memory_stats()
    return module.memory_allocated()


def peak_bytes(device: torch.device) -> int:
    """Peak of allocated memory in bytes since `start_peak`."""
    return torch.get_device_module(device).max_memory_allocated()


def free_memory(device: torch.device) -> None:
    """Give cached memory back."""
    if device.type != "cpu" and hasattr(torch.get_device_module(device), "empty_cache"):
        torch.get_device_module(device).empty_cache()


def memory_bytes(device: torch.device) -> int | None:
    """Memory of the device, or of this machine where the device is the CPU; None: unknown."""
    if device.type == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    properties = getattr(torch.get_device_module(device), "get_device_properties", None)
    return properties(device).total_memory if properties else None


def name_of(device: torch.device) -> str:
    """Name of the accelerator or processor."""
    return processor_name() if device.type == "cpu" else machine(device)


def processor_name() -> str:
    """Model of the CPU, as Linux gives it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 FLOPs a second by the device's data sheet; None for devices that DATA_SHEET lacks."""
    name = name_of(device)
    return next((flops for part, flops in DATA_SHEET.items() if all(word in name for word in part.split())), None)


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def describe(device: torch.device) -> dict[str, object]:
    """The machine and its software, as the JSON of a measurement names them."""
    memory = memory_bytes(device)
    return {
        "device": name_of(device),
        "device_type": device.type,
        "device_memory_gib": None if memory is None else round(memory / 2**30, 1),
        "processor": processor_name(),
        "cores": usable_cores(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "autocast": "bfloat16" if autocasts(device) else "none: everything trained is bfloat16",
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "date": time.strftime("%Y-%m-%d"),
    }


@cache
def autocasts(device: torch.device) -> bool:
    """True if torch can compute in bfloat16 by itself on the device; a backend may say so and have no kernels."""
    try:
        with torch.autocast(device.type, torch.bfloat16):
            ones = torch.ones(2, 2, device=device)
            return (ones @ (ones + 1)).dtype is torch.bfloat16
    except (NotImplementedError, RuntimeError):
        return False


def bfloat16(device: torch.device) -> AbstractContextManager:
    """Context of bfloat16 autocast, or of nothing where the device has none."""
    return torch.autocast(device.type, torch.bfloat16) if autocasts(device) else nullcontext()


def plain(device: torch.device) -> AbstractContextManager:
    """Context without autocast."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()
