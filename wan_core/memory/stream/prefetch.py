"""The thread that reads blocks from their file before their turn."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from .ring import Ring
from .transfer import BlockTransfer, Piece, TransferBackend


class Prefetcher:
    """Blocks on their way from the file to the device, read by a thread so that the disk stalls nobody else."""

    def __init__(
        self, transfers: dict[int, BlockTransfer], backend: TransferBackend, ring: Ring, check: Callable[[], None]
    ):
        self.transfers, self.backend, self.ring, self.check = transfers, backend, ring, check
        self._changed = threading.Condition()
        self._closed = False
        self._error: BaseException | None = None
        self._era = 0  # counts restarts, so that what was read before one is dropped
        self._thread = threading.Thread(target=self._read_on, name="wan-block-reader", daemon=True)
        self._thread.start()

    def take(self, block: int) -> torch.Tensor:
        """The slot in which a block's bytes lie, or will lie when the device gets there."""
        with self._changed:
            if self._error or self.ring.block(self.ring.released) != block:
                self._restart(block)
            self._changed.wait_for(lambda: self._error or self.ring.may_compute())
            if self._error:
                raise self._error
            slot = self.ring.slot(self.ring.released)
        self.backend.enter(slot)
        return self.backend.slots[slot]

    def give_back(self) -> None:
        """The block taken last has been computed with."""
        self.backend.leave(self.ring.slot(self.ring.released))
        with self._changed:
            self.ring.released += 1
            self._copy_on()
            self._changed.notify_all()

    def close(self) -> None:
        """Stop; the buffers may be freed afterwards."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join()
        self.backend.close()

    def _restart(self, block: int) -> None:
        self._era += 1
        self._error = None
        self.ring.restart(block)
        self._changed.notify_all()

    def _copy_on(self) -> None:
        while self.ring.may_copy():
            ticket = self.ring.copied
            block, _ = self.ring.of_piece(ticket)
            if piece := self._piece(ticket):
                self.backend.copy(self.ring.stage(ticket), self.ring.slot(block), piece)
            self.ring.copied += 1

    def _piece(self, ticket: int) -> Piece | None:
        """What comes with a piece's ticket; nothing where a block has fewer pieces than others."""
        block, number = self.ring.of_piece(ticket)
        pieces = self.transfers[self.ring.block(block)].pieces
        return pieces[number] if number < len(pieces) else None

    @torch.no_grad()
    def _read_on(self) -> None:
        while (task := self._next_task()) is not None:
            era, ticket, piece = task
            error = None
            try:
                if self.ring.of_piece(ticket)[1] == 0:
                    self.check()
                if piece:
                    piece.read_into(self.backend.stage(self.ring.stage(ticket)))
            except BaseException as caught:  # the thread that computes must hear of it, whatever it is
                error = caught
            self._report(era, error)

    def _next_task(self) -> tuple[int, int, Piece | None] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or (self._error is None and self.ring.may_read()))
            return None if self._closed else (self._era, self.ring.read, self._piece(self.ring.read))

    def _report(self, era: int, error: BaseException | None) -> None:
        with self._changed:
            if era == self._era:
                self._error = error
                self.ring.read += error is None
                self._copy_on()
            self._changed.notify_all()
