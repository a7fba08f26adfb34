"""What formats share whose numbers are small integers or floats times a scale, for the matrix or for each row."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from .. import kernels
from ..mapped import rows_of
from .base import Format, Packed, Parts

_SMALLEST = 1e-30  # the scale of a row of zeros


class Scaled(Format):
    """``data`` [rows, columns] and perhaps ``scale`` float32 [1, 1] or [rows, 1].

    Of a tensor with other dimensions the first are the rows, and all others the columns.
    """

    dtype: torch.dtype  # of data

    @property
    @abstractmethod
    def largest(self) -> float:
        """What data can hold."""

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
    x = x.contiguous()
    packed = torch.empty(x.shape, device=x.device, dtype=kind.dtype)
    scale = torch.empty(len(x), 1, device=x.device)
    if kernels.quantise_rows(x, packed, scale, kind.largest):
        return packed, scale
    if x.dtype == torch.bfloat16 and kind.dtype.is_floating_point:
        return _packed_in_half(x, kind)
    made = kind.pack(x)
    return made.parts["data"], made.parts["scale"]


def _packed_in_half(x: Tensor, kind: Scaled) -> tuple[Tensor, Tensor]:
    """In three passes of bfloat16 instead of six of float32. The scale leaves room for what rounding adds."""
    size = torch.linalg.vector_norm(x, torch.inf, dim=1, keepdim=True)
    scale = (size.float() * (1.01 / kind.largest)).clamp_(min=_SMALLEST).to(x.dtype)
    return (x / scale).to(kind.dtype), scale.float()


def rescaled(product: Tensor, of_row: Tensor, of_column: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """``product * of_row * of_column + bias`` [tokens, rows], computed in float32, in ``out``."""
    if not kernels.rescale(out, product, of_row, of_column, bias):
        exact = product.float().mul_(of_row).mul_(of_column.view(1, -1))
        out.copy_(exact if bias is None else exact.add_(bias))
    return out
