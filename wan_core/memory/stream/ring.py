"""Which blocks stream, and the order in which they pass: no threads, no devices, no clock."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import WanError

STAGES = 8  # pieces in host memory on their way: some are read while others are copied


def spread(count: int, layers: int) -> tuple[int, ...]:
    """Which blocks are swapped: evenly spaced, so that resident ones between them give their copies more time."""
    return tuple(i for i in range(layers) if (i + 1) * count // layers > i * count // layers)


def check_count(count: int, layers: int) -> None:
    if not 0 <= count <= layers:
        raise WanError(
            f"Cannot keep {count} blocks off the device: this model has {layers} blocks. Choose 0 to {layers}."
        )


class Ring:
    """Who may go on: the reader, the copier or the computation. Knows no threads, no devices and no clock.

    Blocks pass in a cycle; the n-th to pass has ticket n. Each comes in so many pieces, which have tickets too, one
    after another over all blocks. ``read`` and ``copied`` count pieces, ``released`` counts blocks that are through. A
    piece takes stage ``ticket % stages``, a block slot ``ticket % slots``.
    """

    def __init__(self, blocks: Sequence[int], *, slots: int, stages: int, pieces: int = 1):
        self.blocks = tuple(blocks)
        self.slots, self.stages, self.pieces = slots, stages, pieces
        self.read = self.copied = self.released = 0
        self._shift = 0

    def block(self, ticket: int) -> int:
        return self.blocks[(ticket + self._shift) % len(self.blocks)]

    def of_piece(self, ticket: int) -> tuple[int, int]:
        """The ticket of a piece's block, and which piece of it that is."""
        return divmod(ticket, self.pieces)

    def stage(self, ticket: int) -> int:
        return ticket % self.stages

    def slot(self, ticket: int) -> int:
        return ticket % self.slots

    def may_read(self) -> bool:
        """Whether the piece ``read`` has a stage: the one that was there before has been copied away."""
        return self.read - self.copied < self.stages

    def may_copy(self) -> bool:
        """Whether the piece ``copied`` is read and has a slot: the block that was there before has been computed."""
        return self.copied < self.read and self.copied // self.pieces - self.released < self.slots

    def may_compute(self) -> bool:
        """Whether the block ``released`` is on the device."""
        return self.released < self.copied // self.pieces

    def restart(self, block: int) -> None:
        """Go on at another block than the next; all that is under way is dropped."""
        self.released = -(-self.read // self.pieces)
        self.read = self.copied = self.released * self.pieces
        self._shift = self.blocks.index(block) - self.released
