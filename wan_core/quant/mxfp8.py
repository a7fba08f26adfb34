"""mxfp8: fp8 numbers with a power of two for each 32 of a row (OCP Microscaling Formats 1.0).

The powers are bytes, exponents with a bias of 127 (e8m0); a byte of zero means zero, as ComfyUI's files use it for
blocks of zeros. No product is computed in this format: matrices are dequantised.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Parts
from .block_scaled import BlockScaled

_LARGEST = 448.0
_BIAS, _MANTISSA = 127, 23  # of float32


@dataclass(frozen=True)
class MXFP8(BlockScaled):
    """``data`` fp8 [rows, columns]."""

    name = "mxfp8"
    block = 32
    stored = (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8)
    scale_dtype = torch.float8_e8m0fnu

    def columns(self, data: Tensor) -> int:
        return data.shape[1]

    def prepared(self, stored: Parts) -> dict[str, Tensor]:
        data = stored["data"]
        return super().prepared(
            {**stored, "data": data.view(torch.float8_e4m3fn) if data.dtype is torch.uint8 else data}
        )

    def _decode(self, parts: Parts, out: Tensor) -> None:
        numbers = parts["data"].float().unflatten(1, (-1, self.block))
        out.copy_(numbers.mul_(_powers(parts["scale"])[..., None]).view(out.shape))

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Quantise rows, rounding to nearest; the powers are those by which the largest number of a block just fits."""
        blocks = weight.float().unflatten(1, (-1, self.block))
        largest = blocks.abs().amax(dim=-1)
        exponent = (largest / _LARGEST).clamp_(min=2.0**-_BIAS).log2_().ceil_().to(torch.int32)
        scale = exponent.add_(_BIAS).clamp_(0, 254).to(torch.uint8).masked_fill_(largest == 0, 0)
        size = _powers(scale)[..., None]
        numbers = torch.where(size == 0, 0, blocks / torch.where(size == 0, 1, size)).clamp_(-_LARGEST, _LARGEST)
        return {"data": numbers.flatten(1).to(torch.float8_e4m3fn), "scale": scale}


def _powers(scale: Tensor) -> Tensor:
    """Exponents as bytes -> float32: the bits of a float32 whose mantissa is zero."""
    return (scale.to(torch.int32) << _MANTISSA).view(torch.float32)
