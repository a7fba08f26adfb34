"""A format whose matrix wants its input scaled, column by column (AWQ's ``pre_quant_scale``)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Format, Parts


@dataclass(frozen=True)
class Smoothed(Format):
    """The parts of ``inner`` and ``smooth`` float32 [1, columns], by which the columns of its matrix are multiplied."""

    inner: Format

    @property
    def name(self) -> str:
        return f"{self.inner.name}_smoothed"

    def columns(self, data: Tensor) -> int:
        return self.inner.columns(data)

    def prepared(self, stored: Parts) -> dict[str, Tensor]:
        return {**self.inner.prepared(_without(stored)), "smooth": stored["smooth"].to(torch.float32).reshape(1, -1)}

    def rows(self, parts: Parts, index: slice | Tensor) -> Parts:
        return {**self.inner.rows(_without(parts), index), "smooth": parts["smooth"]}

    def _decode(self, parts: Parts, out: Tensor) -> None:
        exact = torch.empty(out.shape, dtype=torch.float32, device=out.device)
        self.inner._decode(_without(parts), exact)
        out.copy_(exact.mul_(parts["smooth"]))

    def lacks_arithmetic(self, device: torch.device) -> bool:
        return self.inner.lacks_arithmetic(device)

    def multiply(self, x: Tensor, parts: Parts, bias: Tensor | None = None) -> Tensor | None:
        return self.inner.multiply(x * parts["smooth"].to(x.dtype), _without(parts), bias)


def _without(parts: Parts) -> dict[str, Tensor]:
    return {name: part for name, part in parts.items() if name != "smooth"}
