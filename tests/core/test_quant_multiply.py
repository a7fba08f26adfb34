"""Products without dequantising: their arithmetic, which PyTorch also has on the CPU, and what happens without it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wan_core.quant import fp8, int8
from wan_core.quant.base import Packed
from wan_core.quant.fp8 import FP8
from wan_core.quant.int8 import Int8
from wan_core.quant.linear import QuantLinear
from wan_core.quant.scaled import quantised_rows
from wan_core.quant.scratch import Scratch

ROWS, COLUMNS, TOKENS = 96, 64, 40


@pytest.fixture
def x() -> Tensor:
    """Tokens of very different sizes: each has a scale of its own."""
    torch.manual_seed(0)
    return (torch.randn(TOKENS, COLUMNS) * torch.logspace(-3, 2, TOKENS)[:, None]).bfloat16()


def packed(kind: FP8 | Int8, *, per_row: bool = True) -> Packed:
    torch.manual_seed(1)
    return kind.pack(torch.randn(ROWS, COLUMNS) * torch.logspace(-2, 0, ROWS)[:, None], per_row=per_row)


def row_error(ours: Tensor, exact: Tensor) -> float:
    """The worst token's, relative to that token."""
    return ((ours.float() - exact).norm(dim=1) / exact.norm(dim=1)).max().item()


@pytest.mark.parametrize("per_row", [True, False])
def test_fp8_product(x: Tensor, per_row: bool):
    """Measured 3 %: activations keep three bits of mantissa. One scale for all tokens would lose the small ones."""
    matrix = packed(FP8(torch.float8_e4m3fn), per_row=per_row)
    ours = fp8.scaled_product(x, matrix.parts["data"], matrix.parts["scale"])
    assert row_error(ours, x.float() @ matrix.dequantise().T) < 0.045


@pytest.mark.parametrize("per_row", [True, False])
def test_int8_product(x: Tensor, per_row: bool):
    """Measured 0.8 %."""
    matrix = packed(Int8(), per_row=per_row)
    ours = int8.scaled_product(x, matrix.parts["data"], matrix.parts["scale"])
    assert row_error(ours, x.float() @ matrix.dequantise().T) < 0.013


@pytest.mark.parametrize("kind", [FP8(torch.float8_e4m3fn), FP8(torch.float8_e5m2), Int8(), Int8(rotation=16)])
def test_multiply_is_the_layers_product_in_pieces(x: Tensor, kind: FP8 | Int8, monkeypatch: pytest.MonkeyPatch):
    """As on a device that can: several pieces of tokens, any shape of input, with the bias."""
    monkeypatch.setattr(fp8, "has_fp8", lambda device: True)
    monkeypatch.setattr(int8, "has_int8", lambda device: True)
    monkeypatch.setattr(fp8, "available", lambda device: True)
    monkeypatch.setattr(int8, "available", lambda device: True)
    monkeypatch.setattr(int8, "gains", lambda device: True)
    monkeypatch.setattr(fp8, "_TOKENS_AT_ONCE", 20)
    monkeypatch.setattr(int8, "_TOKENS_AT_ONCE", 20)
    if kind == FP8(torch.float8_e5m2):  # the CPU has no product of the two kinds of fp8
        monkeypatch.setattr(
            fp8,
            "scaled_product",
            lambda x, data, scale, bias, out: out.copy_(x.float() @ (data.float() * scale).T + bias),
        )
    matrix, bias = packed(kind), torch.randn(ROWS).bfloat16()
    layer = QuantLinear(matrix, bias, Scratch())
    with torch.no_grad():
        ours = layer(x.view(2, 20, COLUMNS))
    exact = x.float() @ matrix.dequantise().T + bias.float()
    assert ours.shape == (2, 20, ROWS) and ours.dtype == torch.bfloat16
    assert layer.scratch.buffer is None  # nothing was dequantised
    assert (ours.flatten(0, 1).float() - exact).norm() < 0.04 * exact.norm()


def test_a_product_that_fails_is_not_tried_again(x: Tensor, monkeypatch: pytest.MonkeyPatch, caplog):
    calls = []

    def fails(*args: Tensor) -> Tensor:
        calls.append(args)
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED when calling")

    monkeypatch.setattr(fp8, "has_fp8", lambda device: True)
    monkeypatch.setattr(fp8, "available", lambda device: True)
    monkeypatch.setattr(fp8, "scaled_product", fails)
    monkeypatch.setattr("wan_core.quant.linear._broken", set())
    matrix = packed(FP8(torch.float8_e4m3fn))
    layer = QuantLinear(matrix, None, Scratch())
    with torch.no_grad():
        first, second = layer(x), layer(x)
    assert len(calls) == 1 and "weights are dequantised instead" in caplog.text
    expected = x @ matrix.dequantise(torch.bfloat16).T
    assert torch.equal(first, expected) and torch.equal(second, expected)


def test_full_precision_files_and_float32_are_never_rounded(x: Tensor, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fp8, "has_fp8", lambda device: True)
    monkeypatch.setattr(fp8, "available", lambda device: True)
    matrix = packed(FP8(torch.float8_e4m3fn, full_precision=True))
    assert matrix.format.multiply(x, matrix.parts) is None
    matrix = packed(FP8(torch.float8_e4m3fn))
    assert matrix.format.multiply(x.float(), matrix.parts) is None
    assert matrix.format.multiply(x[:, :60], {"data": matrix.parts["data"][:, :60]}) is None  # no multiple of 16


def test_without_kernels_and_row_scales_matrices_are_dequantised(x: Tensor, monkeypatch: pytest.MonkeyPatch):
    """Scaling products step by step moves more bytes than the packed matrix saves."""
    monkeypatch.setattr(fp8, "has_fp8", lambda device: True)
    monkeypatch.setattr(int8, "has_int8", lambda device: True)
    for kind in (FP8(torch.float8_e4m3fn), Int8()):
        matrix = packed(kind)
        assert matrix.format.multiply(x, matrix.parts) is None


def test_on_hopper_int8_is_dequantised(x: Tensor, monkeypatch: pytest.MonkeyPatch):
    for name in ("has_int8", "available"):
        monkeypatch.setattr(int8, name, lambda device: True)
    matrix = packed(Int8())
    for capability, multiplies in (((9, 0), False), ((8, 9), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert (matrix.format.multiply(x, matrix.parts) is not None) is multiplies


def test_activations_packed_in_half_precision_stay_in_range(x: Tensor):
    """The largest number of each row, after both roundings, is one that fp8 has."""
    data, scale = quantised_rows(x, fp8.ACTIVATIONS)
    assert data.float().isfinite().all() and data.float().abs().amax() <= 448
    assert row_error(data.float() * scale, x.float()) < 0.04
    zeros, _ = quantised_rows(torch.zeros(3, 16, dtype=torch.bfloat16), fp8.ACTIVATIONS)
    assert not zeros.float().any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", [FP8(torch.float8_e4m3fn), FP8(torch.float8_e5m2), Int8(), Int8(rotation=16)])
def test_on_cuda(x: Tensor, kind: FP8 | Int8):
    matrix = packed(kind)
    exact = x.float() @ matrix.dequantise().T
    on_device = matrix.to("cuda")
    with torch.no_grad():
        ours = QuantLinear(on_device, None, Scratch())(x.cuda()).cpu()
    assert row_error(ours, exact) < 0.06
    assert torch.equal(on_device.dequantise().cpu(), matrix.dequantise()) or kind == Int8(rotation=16)
