"""Devices: which one to use, and how much room it has."""

from __future__ import annotations

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
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise WanError(f"Device {name!r} is not available ({str(error).splitlines()[0]}). Try cpu.") from error
    return device


def available_bytes(device: torch.device) -> int:
    """Memory that can still be allocated, what the allocator holds in reserve included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available


def empty_cache() -> None:
    """Give the allocator's reserve back to the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
