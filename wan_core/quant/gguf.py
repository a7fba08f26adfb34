"""GGUF's block types: weights in blocks of 32 or 256 along a row, each block with scales of its own.

Formats as ggml defines them (github.com/ggml-org/ggml, ``ggml-common.h``); the arithmetic is float32, in the order of
ggml's reference, so that results agree bit for bit. Everything is whole-tensor PyTorch, for any device. Sizes, numbers
and names of the types are those of the package gguf, which is imported when the first such file is opened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import WanError
from .base import Format, Parts

Decode = Callable[[Tensor], Tensor]  # blocks [n, bytes] uint8 -> [n, weights] float32


class BlockType(NamedTuple):
    weights: int
    bytes: int
    decode: Decode


@cache
def block_type(name: str) -> BlockType:
    """One of ``DECODERS``: how many weights and bytes a block has, and how it is decoded."""
    tables = package()
    weights, size = tables.GGML_QUANT_SIZES[tables.GGMLQuantizationType[name]]
    return BlockType(weights, size, DECODERS[name])


def package() -> ModuleType:
    """
    Raises:
        WanError: gguf is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise WanError(f"Reading and writing GGUF needs the package gguf ({error}): pip install gguf") from error
    return gguf


@dataclass(frozen=True)
class GGUF(Format):
    """``data`` uint8 [rows, bytes of a row]."""

    type: str

    @property
    def name(self) -> str:
        return f"gguf:{self.type}"

    def columns(self, data: Tensor) -> int:
        weights, size, _ = block_type(self.type)
        return data.shape[1] // size * weights

    def _decode(self, parts: Parts, out: Tensor) -> None:
        _, size, decode = block_type(self.type)
        out.copy_(decode(parts["data"].reshape(-1, size)).view(out.shape))


def _q4_0(blocks: Tensor) -> Tensor:
    d, q = blocks.split((2, 16), dim=1)
    return _half(d) * (_bits(q, 4, width=16).flatten(1).to(torch.int8) - 8).float()


def _q4_1(blocks: Tensor) -> Tensor:
    d, m, q = blocks.split((2, 2, 16), dim=1)
    return _half(d) * _bits(q, 4, width=16).flatten(1).float() + _half(m)


def _q5_0(blocks: Tensor) -> Tensor:
    d, high, low = blocks.split((2, 4, 16), dim=1)
    return _half(d) * (_five_bits(low, high).to(torch.int8) - 16).float()


def _q5_1(blocks: Tensor) -> Tensor:
    d, m, high, low = blocks.split((2, 2, 4, 16), dim=1)
    return _half(d) * _five_bits(low, high).float() + _half(m)


def _q8_0(blocks: Tensor) -> Tensor:
    d, q = blocks.split((2, 32), dim=1)
    return q.view(torch.int8).float() * _half(d)


def _q2_k(blocks: Tensor) -> Tensor:
    scales, q, d, dmin = blocks.split((16, 64, 2, 2), dim=1)
    scale = _half(d) * (scales & 15).float()
    minimum = _half(dmin) * (scales >> 4).float()
    q = _bits(q, 2, width=32).reshape(-1, 16, 16).float()
    return (scale[..., None] * q - minimum[..., None]).flatten(1)


def _q3_k(blocks: Tensor) -> Tensor:
    mask, low, scales, d = blocks.split((32, 64, 12, 2), dim=1)
    scale = _bits(scales[:, :8], 4, width=8).flatten(1) | _bits(scales[:, 8:], 2, width=4).flatten(1) << 4
    scale = _half(d) * (scale.to(torch.int8) - 32).float()
    low = _bits(low, 2, width=32).reshape(-1, 16, 16).to(torch.int8)
    absent = _bits(mask, 1, width=32).reshape(-1, 16, 16) ^ 1  # a set bit means that nothing is taken off
    return (scale[..., None] * (low - (absent << 2).to(torch.int8)).float()).flatten(1)


def _q4_k(blocks: Tensor) -> Tensor:
    d, dmin, scales, q = blocks.split((2, 2, 12, 128), dim=1)
    return _scaled_and_shifted(d, dmin, scales, _bits(q, 4, width=32).reshape(-1, 8, 32))


def _q5_k(blocks: Tensor) -> Tensor:
    d, dmin, scales, high, low = blocks.split((2, 2, 12, 32, 128), dim=1)
    low = _bits(low, 4, width=32).reshape(-1, 8, 32)
    return _scaled_and_shifted(d, dmin, scales, low | _bits(high, 1, width=32).reshape(-1, 8, 32) << 4)


def _q6_k(blocks: Tensor) -> Tensor:
    low, high, scales, d = blocks.split((128, 64, 16, 2), dim=1)
    scale = _half(d) * scales.view(torch.int8).float()
    q = _bits(low, 4, width=64).reshape(-1, 8, 32) | _bits(high, 2, width=32).reshape(-1, 8, 32) << 4
    return (scale[..., None] * (q.to(torch.int8) - 32).view(-1, 16, 16).float()).flatten(1)


def _iq4_nl(blocks: Tensor) -> Tensor:
    d, q = blocks.split((2, 16), dim=1)
    return _half(d) * _levels(_bits(q, 4, width=16).flatten(1))


def _iq4_xs(blocks: Tensor) -> Tensor:
    d, high, low, q = blocks.split((2, 2, 4, 128), dim=1)
    scale = _bits(low, 4, width=1).flatten(1) | _bits(high, 2, width=1).flatten(1) << 4
    scale = _half(d) * (scale.to(torch.int8) - 32).float()
    return (scale[..., None] * _levels(_bits(q, 4, width=16).reshape(-1, 8, 32))).flatten(1)


def _half(x: Tensor) -> Tensor:
    """Pairs of bytes as float16 -> float32."""
    return x.contiguous().view(torch.float16).float()


def _bits(x: Tensor, bits: int, *, width: int) -> Tensor:
    """The fields of bytes, lowest first: [n, m * width] -> [n, m, 8 / bits, width]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=x.device)
    return (x.reshape(len(x), -1, 1, width) >> shifts[:, None]) & ((1 << bits) - 1)


def _five_bits(low: Tensor, high: Tensor) -> Tensor:
    return _bits(low, 4, width=16).flatten(1) | _bits(high, 1, width=1).flatten(1) << 4


def _scaled_and_shifted(d: Tensor, dmin: Tensor, packed: Tensor, q: Tensor) -> Tensor:
    """Eight groups of 32, with 6-bit scales and minima packed in twelve bytes."""
    low_scale, low_min, high = packed.view(-1, 3, 4).unbind(dim=1)
    scale = torch.cat([low_scale & 63, (high & 15) | ((low_scale >> 2) & 48)], dim=1)
    minimum = torch.cat([low_min & 63, (high >> 4) | ((low_min >> 2) & 48)], dim=1)
    scale, minimum = _half(d) * scale.float(), _half(dmin) * minimum.float()
    return (scale[..., None] * q.float() - minimum[..., None]).flatten(1)


def _levels(q: Tensor) -> Tensor:
    """Sixteen levels that are denser around zero."""
    return torch.tensor(package().quants.IQ4_NL.kvalues, dtype=torch.float32, device=q.device)[q.int()]


DECODERS: dict[str, Decode] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}
