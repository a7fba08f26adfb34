"""Block swap: some blocks keep their weights in the mapped file and visit the device one at a time, one way only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .checkpoint.build import assign
from .errors import WanError


class BlockSwap:
    """Brings block weights to the device for the time of one block, and lets them go; nothing is copied back.

    The last ``count`` blocks are swapped, so that the first are at hand when a step begins.
    """

    def __init__(
        self,
        blocks: nn.ModuleList,
        count: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        keep_float32: Callable[[str], bool],
    ):
        if not 0 <= count <= len(blocks):
            raise WanError(f"Cannot keep {count} blocks off the device: this model has {len(blocks)} blocks. "
                           f"Choose 0 to {len(blocks)}.")
        self.blocks = blocks
        self.first = len(blocks) - count
        self.device = torch.device(device)
        self.dtype = dtype
        self.keep_float32 = keep_float32
        self._stored: dict[int, dict[str, torch.Tensor]] = {}

    def places(self, key: str) -> bool:
        """Whether a weight of the model, by its full name, lives on the device all the time."""
        parts = key.split(".")
        return parts[0] != "blocks" or int(parts[1]) < self.first

    def adopt(self) -> BlockSwap:
        """Take over the swapped blocks' weights, which must be loaded (mapped) by now."""
        for index in range(self.first, len(self.blocks)):
            block = self.blocks[index]
            self._stored[index] = {name: p.data for name, p in block.named_parameters()}
            self._empty(block)
        return self

    @contextmanager
    def block(self, index: int) -> Iterator[None]:
        """The time in which a block's weights are on the device."""
        if index < self.first:
            yield
            return
        block = self.blocks[index]
        for name, stored in self._stored[index].items():
            target = torch.float32 if self.keep_float32(name) else self.dtype
            assign(block, name, stored.to(self.device, target))
        try:
            yield
        finally:
            self._empty(block)

    def _empty(self, block: nn.Module) -> None:
        for name, parameter in block.named_parameters():
            assign(block, name, torch.empty_like(parameter, device="meta"))
