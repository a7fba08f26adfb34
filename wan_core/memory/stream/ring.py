"""Which blocks stream, and the order in which they pass: no threads, no devices, no clock."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import WanError

STAGES = 2  # blocks in host memory on their way: one is read while the other is copied


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

    Blocks pass in a cycle; the n-th to pass has ticket n. ``read``, ``copied`` and ``released`` count the tickets that
    are through with each. A ticket takes stage ``ticket % stages`` and slot ``ticket % slots``.
    """

    def __init__(self, blocks: Sequence[int], *, slots: int, stages: int):
        self.blocks = tuple(blocks)
        self.slots, self.stages = slots, stages
        self.read = self.copied = self.released = 0
        self._shift = 0

    def block(self, ticket: int) -> int:
        return self.blocks[(ticket + self._shift) % len(self.blocks)]

    def stage(self, ticket: int) -> int:
        return ticket % self.stages

    def slot(self, ticket: int) -> int:
        return ticket % self.slots

    def may_read(self) -> bool:
        """Whether the ticket ``read`` has a stage: the one that was there before has been copied away."""
        return self.read - self.copied < self.stages

    def may_copy(self) -> bool:
        """Whether the ticket ``copied`` is read and has a slot: the one that was there before has been computed."""
        return self.copied < self.read and self.copied - self.released < self.slots

    def may_compute(self) -> bool:
        """Whether the ticket ``released`` is on the device."""
        return self.released < self.copied

    def restart(self, block: int) -> None:
        """Go on at another block than the next; all that is under way is dropped."""
        self.copied = self.released = self.read
        self._shift = self.blocks.index(block) - self.read
