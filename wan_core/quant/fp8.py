"""fp8: e4m3fn and e5m2, as plain casts or with scales (ComfyUI's "fp8 scaled").

Micikevicius et al. 2022 (arXiv 2209.05433).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import is_out_of_memory
from ..kernels import available
from .base import Parts
from .scaled import Scaled, quantised_rows, rescaled

_TOKENS_AT_ONCE = 16384


@dataclass(frozen=True)
class FP8(Scaled):
    """``full_precision``: the file asks for exact products (ComfyUI's ``full_precision_matrix_mult``)."""

    dtype: torch.dtype
    full_precision: bool = False

    @property
    def name(self) -> str:
        return {torch.float8_e4m3fn: "fp8_e4m3fn", torch.float8_e5m2: "fp8_e5m2"}.get(self.dtype, str(self.dtype))

    @property
    def largest(self) -> float:
        return torch.finfo(self.dtype).max

    def lacks_arithmetic(self, device: torch.device) -> bool:
        return not has_fp8(device)

    def multiply(self, x: Tensor, parts: Parts, bias: Tensor | None = None) -> Tensor | None:
        data = parts["data"]
        if self.full_precision or not can_multiply(x, data):
            return None
        scale = parts["scale"] if "scale" in parts else torch.ones(1, 1, device=x.device)
        tokens = x.reshape(-1, x.shape[-1])
        out = x.new_empty(len(tokens), len(data))
        for part, result in zip(tokens.split(_TOKENS_AT_ONCE), out.split(_TOKENS_AT_ONCE), strict=True):
            scaled_product(part, data, scale, bias, result)
        return out.view(*x.shape[:-1], len(data))


def can_multiply(x: Tensor, data: Tensor) -> bool:
    """CUDA from compute capability 8.9 (Ada), in half precision, with sides that are multiples of 16."""
    if x.dtype not in (torch.bfloat16, torch.float16) or data.dtype.itemsize > 1 or any(n % 16 for n in data.shape):
        return False
    return has_fp8(x.device) and (scales_by_row(x) or available(x.device))


def scales_by_row(x: Tensor) -> bool:
    """Whether the product itself takes a scale for each row: without that, and without a kernel for the scales, more
    bytes are moved than dequantising would."""
    return x.dtype == torch.bfloat16 and x.device.type == "cuda" and str(x.device) not in _no_row_scales


_no_row_scales: set[str] = set()  # devices whose product refused them once


def has_fp8(device: torch.device) -> bool:
    """Whether the device multiplies fp8 matrices."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def scaled_product(
    x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """``x @ (data * scale).T + bias`` for x [tokens, columns] that is itself rounded to fp8, token by token.

    Where the product takes no scale for each row (before Hopper), they are applied to what it answers.
    """
    out = x.new_empty(len(x), len(data)) if out is None else out
    packed, size = quantised_rows(x, ACTIVATIONS)
    if scales_by_row(x):
        try:
            return torch._scaled_mm(
                packed,
                data.t(),
                scale_a=size,
                scale_b=scale.view(1, -1).expand(1, len(data)).contiguous(),
                bias=None if bias is None else bias.to(out.dtype),
                out_dtype=out.dtype,
                use_fast_accum=True,
                out=out,
            )
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            _no_row_scales.add(str(x.device))
    one = torch.ones((), device=x.device)
    product = torch._scaled_mm(
        packed, data.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return rescaled(product, size, scale, bias, out)


ACTIVATIONS = FP8(torch.float8_e4m3fn)
