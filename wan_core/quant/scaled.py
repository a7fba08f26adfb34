"""What formats share whose numbers are small integers or floats times a scale, for the matrix or for each row."""

from __future__ import annotations

import torch
from torch import Tensor

from ..mapped import rows_of
from .base import Format, Packed, Parts

_SMALLEST = 1e-30  # the scale of a row of zeros


class Scaled(Format):
    """``data`` [rows, columns] and perhaps ``scale`` float32 [1, 1] or [rows, 1].

    Of a tensor with other dimensions the first are the rows, and all others the columns.
    """

    dtype: torch.dtype  # of data
    largest: float  # what data can hold

    def columns(self, data: Tensor) -> int:
        return data.shape[1]

    def prepared(self, stored: Parts) -> dict[str, Tensor]:
        data = stored["data"]
        parts = {"data": data.reshape(len(data) if data.ndim else 1, -1)}
        if data.dtype is torch.uint8:
            parts["data"] = parts["data"].view(self.dtype)
        if "scale" in stored:
            parts["scale"] = stored["scale"].to(torch.float32).reshape(-1, 1)
        return parts

    def rows(self, parts: Parts, index: slice | Tensor) -> Parts:
        data, scale = parts["data"], parts.get("scale")
        if scale is None:
            return {"data": rows_of(data, index)}
        return {"data": rows_of(data, index), "scale": scale[index] if len(scale) > 1 else scale}

    def _decode(self, parts: Parts, out: Tensor) -> None:
        out.copy_(parts["data"])
        if "scale" in parts:
            out.mul_(parts["scale"])  # computed in float32 and rounded once, because the scale is no 0-d tensor

    def pack(self, weight: Tensor, *, per_row: bool = True) -> Packed:
        """Quantise a matrix, rounding to nearest, with one scale for each row or one in all."""
        rows = weight.float()
        size = rows.abs().amax(dim=1, keepdim=True) if per_row else rows.abs().amax().view(1, 1)
        scale = (size / self.largest).clamp_(min=_SMALLEST)
        return Packed(self, {"data": self._rounded(rows / scale), "scale": scale})

    def _rounded(self, x: Tensor) -> Tensor:
        return x.clamp_(-self.largest, self.largest).to(self.dtype)


def quantised_rows(x: Tensor, kind: Scaled) -> tuple[Tensor, Tensor]:
    """Activations [tokens, columns] -> packed, and their scale [tokens, 1]: each token by its own largest value."""
    packed = kind.pack(x)
    return packed.parts["data"], packed.parts["scale"]
