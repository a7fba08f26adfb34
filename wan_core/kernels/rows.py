"""The kernels: one program for each row (a token), which it reads once and writes once; sums are float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _layer_norm(x, weight, bias, out, x_stride, out_stride, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(value, 0) / width
    centred = tl.where(inside, value - mean, 0.0)
    deviation = tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
    w = tl.load(weight + columns, mask=inside, other=0.0)
    b = tl.load(bias + columns, mask=inside, other=0.0)
    tl.store(out + row * out_stride + columns, (centred * deviation * w + b).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm(x, weight, x_stride, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    place = x + row * x_stride + columns
    value = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    size = tl.rsqrt(tl.sum(value * value, 0) / width + eps)
    w = tl.load(weight + columns, mask=inside, other=0.0)
    tl.store(place, (value * size * w).to(x.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_rotated(x, weight, table, x_stride, width, pairs, eps, HALF: tl.constexpr):
    """As above, two neighbours at a time: (a, b) -> (a cos - b sin, a sin + b cos)."""
    row = tl.program_id(0).to(tl.int64)
    number = tl.arange(0, HALF)  # of a pair in the row
    inside = number < width // 2
    place = x + row * x_stride + 2 * number
    a = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(place + 1, mask=inside, other=0.0).to(tl.float32)
    size = tl.rsqrt(tl.sum(a * a + b * b, 0) / width + eps)
    a = (a * size * tl.load(weight + 2 * number, mask=inside, other=0.0)).to(x.dtype.element_ty).to(tl.float32)
    b = (b * size * tl.load(weight + 2 * number + 1, mask=inside, other=0.0)).to(x.dtype.element_ty).to(tl.float32)
    turn = table + row * pairs * 2 + 2 * (number % pairs)
    cos = tl.load(turn, mask=inside, other=0.0)
    sin = tl.load(turn + 1, mask=inside, other=0.0)
    tl.store(place, (a * cos - b * sin).to(x.dtype.element_ty), mask=inside)
    tl.store(place + 1, (a * sin + b * cos).to(x.dtype.element_ty), mask=inside)


@triton.jit
def _add_gated(x, y, gate, x_stride, y_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    place = x + row * x_stride + columns
    value = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    update = tl.load(y + row * y_stride + columns, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + columns, mask=inside, other=0.0)
    tl.store(place, (value + update * g).to(x.dtype.element_ty), mask=inside)


@triton.jit
def _quantise(x, packed, scale, x_stride, packed_stride, width, largest, ROUND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    size = tl.maximum(tl.max(tl.abs(value), 0) / largest, 1e-30)
    value = value / size
    if ROUND:  # half away from zero; PyTorch rounds half to even, which a quotient all but never is
        value = tl.where(value >= 0, tl.floor(value + 0.5), tl.ceil(value - 0.5))
    value = tl.minimum(tl.maximum(value, -largest), largest)
    tl.store(packed + row * packed_stride + columns, value.to(packed.dtype.element_ty), mask=inside)
    tl.store(scale + row, size)


@triton.jit
def _rescale(out, product, of_row, of_column, bias, width, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(product + row * width + columns, mask=inside, other=0).to(tl.float32)
    value = value * tl.load(of_row + row) * tl.load(of_column + columns, mask=inside, other=0.0)
    if HAS_BIAS:
        value += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + columns, value.to(out.dtype.element_ty), mask=inside)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor) -> None:
    width = _checked(x, weight, bias)
    with _on(x):
        _layer_norm[(len(x),)](
            x, weight, bias, out, x.stride(0), out.stride(0), width, eps, BLOCK=_power(width), num_warps=_warps(width)
        )


def rms_norm_(x: Tensor, weight: Tensor, eps: float, table: Tensor | None) -> None:
    width = _checked(x, weight)
    with _on(x):
        if table is None:
            _rms_norm[(len(x),)](x, weight, x.stride(0), width, eps, BLOCK=_power(width), num_warps=_warps(width))
            return
        pairs = table.shape[-2]
        if not table.is_contiguous() or len(table) != len(x) or width % (2 * pairs) or table.dtype != torch.float32:
            raise ValueError(f"a table {list(table.shape)} for tokens {list(x.shape)}")
        _rms_norm_rotated[(len(x),)](
            x, weight, table, x.stride(0), width, pairs, eps, HALF=_power(width // 2), num_warps=_warps(width)
        )


def add_gated_(x: Tensor, y: Tensor, gate: Tensor) -> None:
    width = _checked(x, gate)
    if y.shape != x.shape or y.stride(-1) != 1:
        raise ValueError(f"{list(y.shape)} to be added to {list(x.shape)}")
    with _on(x):
        _add_gated[(len(x),)](x, y, gate, x.stride(0), y.stride(0), width, BLOCK=_power(width), num_warps=_warps(width))


def quantise_rows(x: Tensor, packed: Tensor, scale: Tensor, largest: float) -> None:
    width = _checked(x)
    whole = not packed.dtype.is_floating_point
    with _on(x):
        _quantise[(len(x),)](
            x,
            packed,
            scale,
            x.stride(0),
            packed.stride(0),
            width,
            largest,
            ROUND=whole,
            BLOCK=_power(width),
            num_warps=_warps(width),
        )


def rescale(out: Tensor, product: Tensor, of_row: Tensor, of_column: Tensor, bias: Tensor | None) -> None:
    width, block = out.shape[1], 2048
    if not (out.is_contiguous() and product.is_contiguous() and of_row.numel() == len(out)):
        raise ValueError(f"a product {list(product.shape)} with {of_row.numel()} scales for {list(out.shape)}")
    of_column = of_column.reshape(-1).expand(width).contiguous()  # of a whole matrix one
    with _on(out):
        _rescale[(len(out), triton.cdiv(width, block))](
            out, product, of_row, of_column, bias, width, HAS_BIAS=bias is not None, BLOCK=block, num_warps=4
        )


def _checked(x: Tensor, *of_columns: Tensor) -> int:
    """The width of rows whose numbers lie beside each other."""
    width = x.shape[-1]
    if x.ndim != 2 or x.stride(1) != 1 or any(v.shape != (width,) or v.stride(0) != 1 for v in of_columns):
        raise ValueError(f"rows {list(x.shape)} with {[list(v.shape) for v in of_columns]}")
    return width


def _power(width: int) -> int:
    return triton.next_power_of_2(width)


def _warps(width: int) -> int:
    return 4 if width <= 2048 else 8 if width <= 8192 else 16


def _on(x: Tensor):
    """Triton starts kernels on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else _Here()


class _Here:
    def __enter__(self) -> None: ...

    def __exit__(self, *error) -> None: ...
