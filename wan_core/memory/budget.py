"""What a part needs of its device at its worst moment: one sum, which the plan, the placement, the eviction and the
host program's memory manager all hear.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

GB = 1e9
WORKSPACE = 10**9  # bytes that no plan knows: a kernel's own memory, fragments, what other programs take meanwhile
UNKNOWN = 10**9  # bytes of activations, where nobody has said for what size a part will be called


@dataclass(frozen=True)
class Budget:
    """Bytes, by what they are for; all on the device but the last.

    Attributes:
        weights: what stays there.
        stream: slots that blocks pass through.
        activations: the peak inside a call.
        held: between calls: latents, and the prompts as the model sees them.
        pinned: of the host's memory, for what is on its way to the device.
    """

    weights: int = 0
    stream: int = 0
    activations: int = 0
    held: int = 0
    pinned: int = 0

    @property
    def loaded(self) -> int:
        """What is there as long as the part is."""
        return self.weights + self.stream

    @property
    def working(self) -> int:
        """What comes and goes while it works."""
        return self.activations + self.held

    @property
    def beside(self) -> int:
        """What must be free beside what is loaded."""
        return self.working + WORKSPACE

    @property
    def total(self) -> int:
        """Of tensors on the device, at the worst moment."""
        return self.loaded + self.working

    def at_work(self, run: Budget) -> Budget:
        """The same part in a run of this size."""
        return replace(self, activations=run.activations, held=run.held)
