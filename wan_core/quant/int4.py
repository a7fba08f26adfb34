"""Signed integers of four bits in a rotated basis, a scale for each row (ComfyUI's ``convrot_w4a4``).

The first of a pair lies in the lower half of its byte. No product is computed in this format: matrices are dequantised.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Format, Parts
from .int8 import rotated


@dataclass(frozen=True)
class Int4(Format):
    """``data`` uint8 [rows, columns / 2], ``scale`` float32 [rows, 1]; ``rotation`` as of ``Int8``."""

    rotation: int = 256

    @property
    def name(self) -> str:
        return f"int4_rotated_{self.rotation}"

    def columns(self, data: Tensor) -> int:
        return data.shape[1] * 2

    def prepared(self, stored: Parts) -> dict[str, Tensor]:
        return {"data": stored["data"].view(torch.uint8), "scale": stored["scale"].to(torch.float32).reshape(-1, 1)}

    def rows(self, parts: Parts, index: slice | Tensor) -> Parts:
        scale = parts["scale"]
        return {"data": parts["data"][index], "scale": scale[index] if len(scale) > 1 else scale}

    def _decode(self, parts: Parts, out: Tensor) -> None:
        data = parts["data"]
        halves = torch.stack([data & 15, data >> 4], dim=-1).view(out.shape)
        signed = (halves ^ 8).to(torch.int8) - 8  # two's complement of four bits
        out.copy_(rotated(signed.float() * parts["scale"], self.rotation))

    def lacks_arithmetic(self, device: torch.device) -> bool:
        return device.type != "cuda"
