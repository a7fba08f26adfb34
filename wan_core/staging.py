"""From files to a CUDA device, through a small ring of pinned memory.

Pieces are read into it by several threads, copied from there by the device itself, and cast on the device: all at the
same time.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass

import torch
from torch import Tensor

log = logging.getLogger(__name__)

PIECE = 32 * 1024**2  # bytes
PIECES = 4  # on their way at once


@dataclass(frozen=True, eq=False)
class Piece:
    """Part of a file for part of a contiguous tensor on the device.

    Attributes:
        read: fills host memory of the stored dtype, as long as ``place``.
        dtype: as stored.
    """

    read: Callable[[Tensor], None]
    dtype: torch.dtype
    place: Tensor  # [N]

    @property
    def bytes(self) -> int:
        return self.place.numel() * self.dtype.itemsize


def upload(pieces: Iterable[Piece], device: torch.device, largest: int, readers: Executor) -> None:
    """Bring pieces to their places on a device: what the current stream does next finds them there.

    Args:
        largest: bytes of a piece, at most.
        readers: threads that read.

    Raises:
        What reading raises; then nothing more is read or copied.
    """
    ring = _Ring(device, largest)
    reading: deque[tuple[Future, int, Piece]] = deque()
    try:
        for number, piece in enumerate(pieces):
            slot = number % PIECES
            if len(reading) == PIECES:
                ring.send(*reading.popleft())
            reading.append((readers.submit(piece.read, ring.room(slot, piece)), slot, piece))
        while reading:
            ring.send(*reading.popleft())
    finally:
        wait([job for job, _, _ in reading])  # PyTorch keeps pinned memory until it is copied, but not until it is read


class _Ring:
    """Pinned buffers, each free again when its copy is done."""

    def __init__(self, device: torch.device, size: int) -> None:
        self._device = device
        self._buffers = [pinned(size) for _ in range(PIECES)]
        self._copied: dict[int, torch.cuda.Event] = {}

    def room(self, slot: int, piece: Piece) -> Tensor:
        """Host memory for a piece, once what was there has been copied."""
        if slot in self._copied:
            self._copied[slot].synchronize()
        return self._buffers[slot][: piece.bytes].view(piece.dtype)

    def send(self, job: Future, slot: int, piece: Piece) -> None:
        """Wait until a piece is read, and have it copied."""
        job.result()
        stored = self._buffers[slot][: piece.bytes].view(piece.dtype)
        if piece.dtype == piece.place.dtype:
            piece.place.copy_(stored, non_blocking=True)
        else:  # fewer bytes than converted ones, or as many, and the device casts faster
            piece.place.copy_(stored.to(self._device, non_blocking=True))
        self._copied[slot] = torch.cuda.Event()
        self._copied[slot].record(torch.cuda.current_stream(self._device))


def pinned(size: int) -> Tensor:
    """Host memory that a device copies from by itself; plain memory, waited for, where the system gives none."""
    try:
        with torch.inference_mode(False):  # other threads write into it, whatever mode they are in
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        log.warning("wan_core: no pinned memory (%s): copies take longer.", str(error).split("\n")[0])
        return torch.empty(size, dtype=torch.uint8)
