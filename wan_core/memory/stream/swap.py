"""Block swap: the modules whose weights come and go."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ...errors import WanError
from ...mapped import is_mapped
from ...recipe import PREFETCH
from .prefetch import Prefetcher
from .ring import STAGES, Ring, check_count, spread
from .transfer import BACKENDS, BlockTransfer, Key, TensorSlot, laid_out, transfer_of

log = logging.getLogger(__name__)

Passenger = tuple[nn.Module, str, torch.Tensor, torch.dtype]  # buffer of a module: its name, as stored, dtype there


class BlockSwap:
    """Brings block weights to the device for the time of one block; nothing is copied back.

    On a device with streams, blocks are prefetched; elsewhere they are copied when their turn comes. Tensors that the
    device can use as they lie in the file (a CPU, in the file's dtype) are not copied at all.

    Args:
        count: how many blocks are swapped, see ``spread``.
        prefetch: how many are on the device before their turn.
        check: called before a block is read; raises when its file has changed.
    """

    def __init__(
        self,
        blocks: nn.ModuleList,
        count: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        keep_float32: Key,
        prefetch: int = PREFETCH,
        check: Callable[[], None] = lambda: None,
    ):
        check_count(count, len(blocks))
        if prefetch < 0:
            raise WanError(f"Cannot prefetch {prefetch} blocks: expected 0 or more.")
        self.blocks = blocks
        self.device = _with_index(torch.device(device))
        self.dtype, self.keep_float32, self.check = dtype, keep_float32, check
        self.indices = spread(count, len(blocks))
        self.prefetch = min(prefetch, max(0, count - 1))
        self._backend = BACKENDS.get(self.device.type)
        self._transfers: dict[int, BlockTransfer] = {}
        self._own: dict[int, BlockTransfer] = {}  # the blocks' own weights, without adapters
        self._check_all = check
        self._prefetcher: Prefetcher | None = None
        self._slot: torch.Tensor | None = None

    def places(self, key: str) -> bool:
        """Whether a weight of the model, by its full name, lives on the device all the time."""
        parts = key.split(".")
        return parts[0] != "blocks" or int(parts[1]) not in self.indices

    def adopt(self) -> BlockSwap:
        """Take over the swapped blocks' weights, which must be loaded (mapped) by now."""
        for index in self.indices:
            load = transfer_of(self.blocks[index], self.device, self.dtype, self.keep_float32)
            load.take_away()
            self._transfers[index] = self._own[index] = load
        return self

    def carry(
        self,
        beside: Mapping[int, Iterable[Passenger]],
        apart: Iterable[tuple[nn.Module, str]],
        checks: Iterable[Callable[[], None]],
    ) -> None:
        """Bring other tensors with the blocks from now on; with nothing given, the blocks' own weights alone again.

        Args:
            beside: what comes with which block.
            apart: (module, name) of a block's parameters that do not stream: the caller puts something in their place.
            checks: called before a block is read, as ``check`` is.
        """
        self.close()
        self._check_all = _all_of((self.check, *checks))
        left = {(id(owner), name) for owner, name in apart}
        for index, own in self._own.items():
            own.take_away()
            more = [
                TensorSlot(owner, name, False, tensor.data, dtype, 0)
                for owner, name, tensor, dtype in beside.get(index, ())
                if (tensor.device, tensor.dtype) != (self.device, dtype) or is_mapped(tensor)
            ]
            stay = (item for item in own.tensors if (id(item.owner), item.name) not in left)
            self._transfers[index] = laid_out([*stay, *more])

    def brings(self, owner: nn.Module, name: str) -> bool:
        """Whether a parameter of a module is among the blocks' own that are copied."""
        return any(item.owner is owner and item.name == name for own in self._own.values() for item in own.tensors)

    @property
    def slots(self) -> int:
        """Blocks that the device holds at once."""
        return self.prefetch + 1 if self._backend else 1

    @property
    def block_bytes(self) -> int:
        """Of the largest swapped block, as it lies in a slot."""
        return max((load.bytes for load in self._transfers.values()), default=0)

    @property
    def moves(self) -> bool:
        """Whether anything is copied: not where the device can use the mapped file itself."""
        return self.block_bytes > 0

    @contextmanager
    def block(self, index: int) -> Iterator[None]:
        """The time in which a block's weights are on the device."""
        load = self._transfers.get(index)
        if load is None:
            yield
            return
        load.put(self._take(index, load))
        try:
            yield
        finally:
            load.take_away()
            if self._prefetcher:
                self._prefetcher.give_back()

    def close(self) -> None:
        """Stop the reader and let the buffers go; the next block starts anew."""
        if self._prefetcher:
            self._stop()
        self._prefetcher = self._slot = None

    def _take(self, index: int, load: BlockTransfer) -> torch.Tensor:
        if self._backend and self.moves:
            return self._running().take(index)
        self._check_all()
        if self._slot is None:
            with torch.inference_mode(False):
                self._slot = torch.empty(self.block_bytes, dtype=torch.uint8, device=self.device)
        with torch.no_grad():
            load.read_into(self._slot)
        return self._slot

    def _running(self) -> Prefetcher:
        if self._prefetcher is None:
            pieces = [transfer.pieces for transfer in self._transfers.values()]
            staged = max(piece.bytes for each in pieces for piece in each)
            backend = self._backend(self.device, self.slots, STAGES, self.block_bytes, staged)
            ring = Ring(self.indices, slots=self.slots, stages=STAGES, pieces=max(map(len, pieces)))
            self._prefetcher = Prefetcher(self._transfers, backend, ring, self._check_all)
            # The thread holds the prefetcher, never the swap: with the model goes the swap, and with it the thread.
            self._stop = weakref.finalize(self, self._prefetcher.close)
        return self._prefetcher


def _all_of(checks: Sequence[Callable[[], None]]) -> Callable[[], None]:
    def check() -> None:
        for one in checks:
            one()

    return check


def _with_index(device: torch.device) -> torch.device:
    """ "cuda" is the current CUDA device; tensors there name it with its number."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
