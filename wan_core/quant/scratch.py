"""The one buffer through which matrices pass that must be moved, cast or dequantised before use."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

from torch import Tensor


class Scratch(threading.local):
    """A buffer of each thread's own, as large as the largest matrix so far.

    Fresh memory for each matrix would cost several times the cast itself, for the system clears every page.
    """

    def __init__(self):
        self.buffer: Tensor | None = None

    def __deepcopy__(self, memo: dict) -> Scratch:
        return Scratch()

    def __reduce__(self):
        return Scratch, ()

    def space(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Uninitialised memory with the device and dtype of ``like``; valid until the next call."""
        size = math.prod(shape)
        buffer = self.buffer
        if buffer is None or buffer.numel() < size or buffer.device != like.device or buffer.dtype != like.dtype:
            self.buffer = None  # the old one goes first: both together might not fit
            self.buffer = like.new_empty(size)
        return self.buffer[:size].view(*shape)

    def fitted(self, weight: Tensor, like: Tensor) -> Tensor:
        """The weight with the device and dtype of ``like``; valid until the next call."""
        if weight.device == like.device and weight.dtype == like.dtype:
            return weight
        return self.space(weight.shape, like).copy_(weight)
