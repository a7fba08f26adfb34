"""Which LoRAs a recipe wants, how strongly, and at which steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from .files import LoraFile, Part


@dataclass(frozen=True, eq=False)
class LoraUse:
    """A LoRA on one expert; steps are counted from 0, both ends included, and None is the last of any schedule."""

    file: LoraFile
    strength: float
    first_step: int = 0
    last_step: int | None = None

    @property
    def ranged(self) -> bool:
        """Whether it does not act at every step."""
        return self.first_step > 0 or self.last_step is not None

    def at(self, step: int) -> float:
        """The strength at a step."""
        within = self.first_step <= step and (self.last_step is None or step <= self.last_step)
        return self.strength if within else 0.0


@dataclass(frozen=True)
class Loras:
    """Each expert's chain, in the order in which it is applied; a dense model's is ``high``."""

    high: tuple[LoraUse, ...] = ()
    low: tuple[LoraUse, ...] = ()

    def __iter__(self) -> Iterator[LoraUse]:
        yield from self.high
        yield from self.low


def merges(uses: Sequence[LoraUse], key: str) -> bool:
    """Whether any adapter of a matrix, by our key, has to be merged into it."""
    return any(not _is_added(part) for use in uses for part in use.file.parts.get(key, ()))


def bytes_beside(uses: Sequence[LoraUse], key: str, dtype: torch.dtype) -> int:
    """What the adapters of a block's matrix, by our key, take on the device in a model that computes in this dtype."""
    total = 0
    for use in uses:
        tensors = use.file.checkpoint.tensors
        for part in use.file.parts.get(key, ()):
            infos = ((tensors[name].shape, dtype if _is_added(part) else part.kind.stored_dtype(tensors[name].dtype))
                     for name in part.keys.values())  # fmt: skip
            total += sum(torch.Size(shape).numel() * kind.itemsize for shape, kind in infos)
    return total


def _is_added(part: Part) -> bool:
    return part.kind.adds(part.keys)
