"""The one buffer through which matrices pass that must be moved, cast or dequantised before use."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from ..mapped import is_mapped, read_into


class Scratch(threading.local):
    """A buffer of each thread's own, as large as the largest matrix so far.

    Fresh memory for each matrix would cost several times the cast itself, for the system clears every page.
    """

    def __init__(self) -> None:
        self.buffer: Tensor | None = None

    def __deepcopy__(self, memo: dict) -> Scratch:
        return Scratch()

    def __reduce__(self) -> tuple[type[Scratch], tuple[()]]:
        return Scratch, ()

    def space(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Uninitialised memory with the device and dtype of ``like``, aligned; valid until the next call."""
        size = math.prod(shape)
        buffer = self.buffer
        if buffer is None or buffer.numel() < size or buffer.device != like.device or buffer.dtype != like.dtype:
            self.buffer = None  # the old one goes first: both together might not fit
            with torch.inference_mode(False):  # it may be written to later, out of inference mode
                self.buffer = buffer = torch.empty(size, device=like.device, dtype=like.dtype)
        return buffer[:size].view(*shape)

    def fitted(self, weight: Tensor, like: Tensor) -> Tensor:
        """The weight with the device and dtype of ``like``, in memory; valid until the next call."""
        if weight.device == like.device and weight.dtype == like.dtype and not is_mapped(weight):
            return weight
        place = self.space(weight.shape, like)
        read_into([(weight, place)])
        return place
