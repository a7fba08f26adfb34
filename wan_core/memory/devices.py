"""Devices: which one to use, and how much room it has."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from ..errors import WanError


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
    names = ["cpu"]
    if torch.cuda.is_available():
        names += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    return names


def total_bytes(device: torch.device) -> int:
    """All the memory that a device has, in use or not; of a CPU what this process may take, swap included."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
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
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available


def empty_cache() -> None:
    """Give the allocators' reserves back to the device and to the system."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if trim := getattr(_c_library(), "malloc_trim", None):  # glibc keeps what was freed below its top
        trim(0)


def _c_library() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None
