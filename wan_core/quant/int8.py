"""int8 with a scale for the matrix or for each row (ComfyUI's ``int8_tensorwise``), perhaps in a rotated basis.

Rotation ("ConvRot"): groups of input channels are multiplied by a symmetric, orthogonal Hadamard matrix before
quantisation, which spreads outliers; the same matrix turns them back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import available
from .base import Parts
from .scaled import Scaled, quantised_rows, rescaled

_TOKENS_AT_ONCE = 8192  # products are int32: twice the bytes of the result


@dataclass(frozen=True)
class Int8(Scaled):
    """``rotation``: the size of a rotated group of columns, a power of 4, or 0."""

    rotation: int = 0
    dtype = torch.int8
    largest = 127.0

    @property
    def name(self) -> str:
        return f"int8_rotated_{self.rotation}" if self.rotation else "int8"

    def _decode(self, parts: Parts, out: Tensor) -> None:
        if not self.rotation:
            super()._decode(parts, out)
            return
        out.copy_(rotated(parts["data"].float() * parts["scale"], self.rotation))

    def _rounded(self, x: Tensor) -> Tensor:
        return super()._rounded(x.round_())

    def lacks_arithmetic(self, device: torch.device) -> bool:
        return not has_int8(device)

    def multiply(self, x: Tensor, parts: Parts, bias: Tensor | None = None) -> Tensor | None:
        data = parts["data"]
        tokens = x.reshape(-1, x.shape[-1])
        if not can_multiply(x, data) or len(tokens) <= 16:
            return None
        tokens = rotated(tokens, self.rotation) if self.rotation else tokens
        out = x.new_empty(len(tokens), len(data))
        step = _even_step(len(tokens))
        for part, result in zip(tokens.split(step), out.split(step), strict=True):
            scaled_product(part, data, parts["scale"], bias, result)
        return out.view(*x.shape[:-1], len(data))


def can_multiply(x: Tensor, data: Tensor) -> bool:
    """CUDA from compute capability 7.5 (Turing), in half precision, with sides that are multiples of 8; and only with
    kernels for the scales, for int32 products that are scaled step by step move far more bytes than dequantising."""
    if x.dtype not in (torch.bfloat16, torch.float16) or any(n % 8 for n in data.shape):
        return False
    return has_int8(x.device) and available(x.device) and gains(x.device)


def gains(device: torch.device) -> bool:
    """Not on Hopper, where it takes as long as dequantising and a product in bfloat16 (docs/benchmarks.md)."""
    return torch.cuda.get_device_capability(device) != (9, 0)


def has_int8(device: torch.device) -> bool:
    """Whether the device multiplies int8 matrices."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 5)


def scaled_product(
    x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """``x @ (data * scale).T + bias`` for x [tokens, columns] that is itself rounded to int8, token by token."""
    out = x.new_empty(len(x), len(data)) if out is None else out
    packed, size = quantised_rows(x, Int8())
    return rescaled(torch._int_mm(packed, data.t()), size, scale, bias, out)


def rotated(x: Tensor, group: int) -> Tensor:
    """Each group of columns times the Hadamard matrix; twice gives x again."""
    turn = hadamard(group, x.device).to(x.dtype)
    return (x.reshape(*x.shape[:-1], -1, group) @ turn).reshape(x.shape)


def hadamard(size: int, device: torch.device) -> Tensor:
    """The regular Hadamard matrix [size, size], normalised, float32; size is a power of 4."""
    seed = torch.ones(4, 4, device=device).sub_(torch.eye(4, device=device).flip(0), alpha=2)
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < size:
        matrix = torch.kron(matrix, seed)
    return matrix / size**0.5


def _even_step(tokens: int) -> int:
    """At most _TOKENS_AT_ONCE, such that no part is too short for the product (17 rows)."""
    parts = -(-tokens // _TOKENS_AT_ONCE)
    return -(-tokens // parts)
