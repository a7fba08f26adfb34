"""Where a language model runs that is needed once, before anything of Wan's is loaded."""

from __future__ import annotations

import torch

from ..dtypes import resolve_dtype
from ..prompt.extension.local_qwen import Place
from ..prompt.extension.question import AnswerFailed
from .devices import available_bytes

_MORE = 1.15  # of the weights: what is computed with them, and the keys and values of a thousand tokens
_GB = 1e9


def place_for(weights: int, device: torch.device, free: int) -> Place:
    """The device where a model fits it, else the CPU.

    Args:
        weights: bytes, of two for each weight.
        free: bytes on the device.

    Raises:
        AnswerFailed: there is too little memory anywhere.
    """
    if device.type != "cpu" and weights * _MORE <= free:
        return Place(device, resolve_dtype("auto", device))
    cpu = torch.device("cpu")
    free = available_bytes(cpu)
    for dtype in (resolve_dtype("auto", cpu), torch.bfloat16):  # float32, which is fast, or half of it
        needed = weights * _MORE * dtype.itemsize / 2
        if needed <= free:
            return Place(cpu, dtype)
    raise AnswerFailed(f"the language model needs {needed / _GB:.0f} GB of memory, and {free / _GB:.0f} GB are free")
