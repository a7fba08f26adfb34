"""Number formats of training: float32 weights, and products in bfloat16 where that is faster."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from ..errors import WanError

PRECISIONS = ("auto", "bf16", "fp32")


def resolve_precision(name: str, device: torch.device | str) -> str:
    """ "bf16" or "fp32"; "auto" is bf16 on a GPU that has it and on a CPU with matrix tiles (AMX).

    Without the tiles a CPU multiplies bfloat16 many times slower than float32.

    Raises:
        WanError: an unknown name.
    """
    if name not in PRECISIONS:
        raise WanError(f"Unknown precision {name!r}: expected one of {', '.join(PRECISIONS)}.")
    if name != "auto":
        return name
    device = torch.device(device)
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"  # older ones emulate it
    return "bf16" if device.type == "cpu" and torch.cpu._is_amx_tile_supported() else "fp32"


def autocast(precision: str, device: torch.device | str, *, once: bool = False) -> AbstractContextManager:
    """Matrix products and convolutions in the precision; weights, norms and sums stay float32.

    Args:
        once: each weight is used once, and its rounded copy is not kept until the end.
    """
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, cache_enabled=not once)


def full_precision(device: torch.device | str) -> AbstractContextManager:
    """An island of float32 within ``autocast``."""
    return torch.autocast(torch.device(device).type, enabled=False)
