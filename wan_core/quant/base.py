"""What a quantised format is: a value that knows what packed tensors mean, with two verbs.

``dequantise`` turns packed tensors into a matrix; ``multiply`` applies them as they are, where the device can. A new
format is one file with a subclass of ``Format``, and its line in ``registry.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..mapped import fetch, rows_of

Parts = Mapping[str, Tensor]  # the tensors of one packed matrix, by their role: "data", "scale"

# Weights decoded in one go: what is made on the way takes several times as much float32 memory as this.
_AT_ONCE = {"cpu": 1 << 20}
_AT_ONCE_ELSEWHERE = 1 << 24


class Format(ABC):
    """How matrices [rows, columns] are packed; rows are output channels.

    The part "data" has one row for each row of the matrix.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """What files and messages call it."""

    @abstractmethod
    def _decode(self, parts: Parts, out: Tensor) -> None:
        """Fill out [rows, columns], of any floating-point dtype, from the parts of these rows."""

    @abstractmethod
    def columns(self, data: Tensor) -> int:
        """The width of the matrix whose part "data" this is."""

    def prepared(self, stored: Parts) -> dict[str, Tensor]:
        """The parts from the tensors of a file, which may have other shapes and containers."""
        return dict(stored)

    def dequantise(self, parts: Parts, out: Tensor) -> Tensor:
        """Fill out [rows, columns], which lies on the parts' device, and return it."""
        count = max(1, _AT_ONCE.get(out.device.type, _AT_ONCE_ELSEWHERE) // out.shape[1])
        for start in range(0, len(out), count):
            rows = slice(start, start + count)
            some = {name: fetch(part) for name, part in self.rows(parts, rows).items()}
            self._decode(some, out[rows])
        return out

    def rows(self, parts: Parts, index: slice | Tensor) -> Parts:
        """The parts of some rows of the matrix."""
        return {"data": rows_of(parts["data"], index)}

    def lacks_arithmetic(self, device: torch.device) -> bool:
        """Whether the format is made for products that this device does not have."""
        return False

    def multiply(self, x: Tensor, parts: Parts, bias: Tensor | None = None) -> Tensor | None:
        """``x @ matrix.T + bias`` for x [..., columns] without dequantising; None where the device or format cannot, or
        where it would move more bytes than dequantising does."""
        return None


@dataclass(frozen=True, eq=False)
class Packed:
    """A matrix in a quantised format, wherever its tensors lie."""

    format: Format
    parts: dict[str, Tensor]

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.parts["data"]), self.format.columns(self.parts["data"])

    @property
    def bytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    def to(self, device: torch.device | str) -> Packed:
        """On a CPU, a matrix in a mapped file stays there, and is read as it is used; what is small comes to memory."""
        on_cpu = torch.device(device).type == "cpu"
        return Packed(
            self.format,
            {
                name: part if on_cpu and name == "data" and part.device.type == "cpu" else fetch(part, device)
                for name, part in self.parts.items()
            },
        )

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix, in memory of its own."""
        parts, data = self.to(self.parts["data"].device).parts, self.parts["data"]
        return self.format.dequantise(parts, torch.empty(self.shape, dtype=dtype, device=data.device))
