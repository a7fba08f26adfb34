"""Devices: which one to use, and how much room it has."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from ..errors import WanError


def default_device() -> torch.device:
    """The accelerator of this machine (CUDA, MPS, XPU, NPU), else the CPU."""
    return _accelerator() or torch.device("cpu")


def _accelerator() -> torch.device | None:
    if torch.cuda.is_available():
        return torch.device("cuda")
    if not hasattr(torch, "accelerator") or not torch.accelerator.is_available():
        return None
    found = torch.accelerator.current_accelerator()
    return torch.device(found.type) if found else None


def backend_of(device: torch.device) -> Any:
    """PyTorch's module for a kind of device, such as ``torch.xpu``; None where there is none."""
    return getattr(torch, device.type, None)


def resolve_device(name: str | torch.device | None) -> torch.device:
    """A device from its name, or the best one.

    Raises:
        WanError: a device that is not here.
    """
    if name is None or name == "auto":
        return default_device()
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()  # which a device without memory, meta, refuses too
    except Exception as error:  # each backend has its own for what it does not know
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WanError(f"Device {name!r} is not available ({reason}). Expected one of {', '.join(_here())}.") from error
    return device


def _here() -> list[str]:
    """The devices of this machine by their names."""
    found = _accelerator()
    if found is None:
        return ["cpu"]
    count = getattr(backend_of(found), "device_count", lambda: 1)()
    return ["cpu", *(f"{found.type}:{i}" for i in range(count))]


def total_bytes(device: torch.device) -> int:
    """All the memory that a device has, in use or not; of a CPU what this process may take, swap included."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    if hasattr(backend_of(device), "mem_get_info"):
        return backend_of(device).mem_get_info(device)[1]
    machine = psutil.virtual_memory().total + psutil.swap_memory().total
    return min([machine, *_container_limits()])


def _container_limits() -> list[int]:
    """What a container is allowed, by control groups of either version."""
    limits = []
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # "max" is no number
            limits.append(int(Path(file).read_text()))
    return limits


def available_bytes(device: torch.device) -> int:
    """Memory that can still be allocated, what the allocator holds in reserve included."""
    module = backend_of(device)
    if device.type == "mps":  # of the machine's own memory
        rest = module.recommended_max_memory() - module.current_allocated_memory()
        return max(0, min(rest, psutil.virtual_memory().available))
    if device.type == "cpu" or not hasattr(module, "mem_get_info"):
        return psutil.virtual_memory().available
    free, _ = module.mem_get_info(device)
    return free + module.memory_reserved(device) - module.memory_allocated(device)


def empty_cache() -> None:
    """Give the allocators' reserves back to the device and to the system."""
    found = _accelerator()
    module: Any = backend_of(found) if found else None
    if hasattr(module, "empty_cache"):
        module.empty_cache()
    if trim := getattr(_c_library(), "malloc_trim", None):  # glibc keeps what was freed below its top
        trim(0)


def _c_library() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None
