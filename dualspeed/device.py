"""The device that a job runs on, whichever accelerator torch knows: CUDA, ROCm, XPU, NPU and so on, or the CPU.

Functions without a `device` speak of `best_device()`.
"""

import os
import platform
import resource

import torch


def best_device() -> torch.device:
    """Accelerator of this process, or the CPU if there is none."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def synchronize(device: torch.device | None = None) -> None:
    """Wait until the device has done what is queued on it."""
    device = device or best_device()
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def peak_memory_bytes(device: torch.device | None = None) -> int:
    """Peak memory of this process: allocated on the device where torch counts that, else resident."""
    device = device or best_device()
    module = torch.get_device_module(device)
    if device.type != "cpu" and hasattr(module, "max_memory_allocated"):
        return module.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def machine(device: torch.device | None = None) -> str:
    """Name of the accelerator, or of the processor with its number of cores."""
    device = device or best_device()
    if device.type == "cpu":
        return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    name_of = getattr(torch.get_device_module(device), "get_device_name", None)
    return name_of(device) if name_of else device.type
