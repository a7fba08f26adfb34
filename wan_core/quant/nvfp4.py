"""nvfp4: numbers of four bits (e2m1), a scale (e4m3) for each sixteen of a row, and one for the matrix.

A number is 0, 0.5, 1, 1.5, 2, 3, 4 or 6 with a sign; the first of a pair lies in the upper half of its byte, as
ComfyUI's files have them. No product is computed in this format: matrices are dequantised.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Parts
from .block_scaled import BlockScaled

_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_LARGEST, _LARGEST_SCALE = 6.0, 448.0
_SMALLEST = 1e-30  # the factor of a matrix of zeros


@dataclass(frozen=True)
class NVFP4(BlockScaled):
    """``data`` uint8 [rows, columns / 2]; ``whole`` is always there."""

    name = "nvfp4"
    block = 16
    stored = (torch.uint8, torch.int8)
    scale_dtype = torch.float8_e4m3fn
    whole = True

    def columns(self, data: Tensor) -> int:
        return data.shape[1] * 2

    def prepared(self, stored: Parts) -> dict[str, Tensor]:
        return super().prepared({**stored, "data": stored["data"].view(torch.uint8)})

    def _decode(self, parts: Parts, out: Tensor) -> None:
        data = parts["data"]
        numbers = torch.stack([data >> 4, data & 15], dim=-1).view(len(data), -1, self.block)
        scale = parts["whole"] * parts["scale"].view(self.scale_dtype).float()
        out.copy_((_levels(data.device)[numbers.int()] * scale[..., None]).view(out.shape))

    def pack(self, weight: Tensor, whole: Tensor) -> dict[str, Tensor]:
        """Quantise rows, rounding to nearest, ties to even; ``whole`` as ``factor`` makes it."""
        blocks = weight.float().unflatten(1, (-1, self.block))
        scale = (blocks.abs().amax(dim=-1) / _LARGEST / whole).clamp_(max=_LARGEST_SCALE).to(self.scale_dtype)
        size = (whole * scale.float())[..., None]
        numbers = torch.where(size == 0, 0, blocks / torch.where(size == 0, 1, size)).clamp_(-_LARGEST, _LARGEST)
        codes = (_rounded(numbers) | numbers.signbit().to(torch.uint8) << 3).flatten(1)
        return {"data": codes[:, ::2] << 4 | codes[:, 1::2], "scale": scale.view(torch.uint8), "whole": whole}

    def factor(self, largest: Tensor) -> Tensor:
        """The factor of a matrix [1, 1] from the largest of its numbers' sizes."""
        return (largest.float() / (_LARGEST * _LARGEST_SCALE)).clamp(min=_SMALLEST).view(1, 1)


def _levels(device: torch.device) -> Tensor:
    return torch.tensor([*_LEVELS, *(-level for level in _LEVELS)], device=device)


def _rounded(numbers: Tensor) -> Tensor:
    """The place of the nearest of ``_LEVELS``, of two the even one, for sizes of up to 6."""
    middle = torch.tensor([(low + high) / 2 for low, high in zip(_LEVELS[:-1], _LEVELS[1:], strict=True)])
    middle[1::2] = torch.nextafter(middle[1::2], torch.zeros(()))  # the upper of these two is the even one
    return torch.bucketize(numbers.abs(), middle.to(numbers.device), out_int32=True).to(torch.uint8)
