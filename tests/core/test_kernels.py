"""The kernels beside their plain twins: in Triton's interpreter on the CPU, and on a CUDA device where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from wan_core import kernels
from wan_core.models.dit.layers import Modulation, RMSNorm, add_gated, layer_norm, modulated_norm
from wan_core.models.dit.rope import rope_table
from wan_core.quant import fp8, int8
from wan_core.quant.scaled import quantised_rows, rescaled

pytest.importorskip("triton", reason="needs Triton, which PyTorch's builds for Linux bring")

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DIM, HEADS = 384, 3  # no power of two
GRID = (2, 3, 4)
ROUNDED = 2**-7  # of bfloat16: a last bit that float32 sums of another order may turn


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels run wherever they can; on a CPU in Triton's interpreter (conftest)."""
    if not CUDA:
        monkeypatch.setattr(kernels, "available", lambda device: True)
    monkeypatch.setattr(kernels, "_broken", set())
    with torch.inference_mode():
        yield
    assert not kernels._broken, "a kernel failed, and its plain twin was compared with itself"


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def tokens(batch: int = 1, seed: int = 0) -> Tensor:
    return (3 * randn(batch, 24, DIM, seed=seed) + 1).bfloat16()


def plainly(call, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "available", lambda device: False)
        return call()


def near(ours: Tensor, expected: Tensor, least: float = 1e-2) -> None:
    """To a last bit; ``least``: of numbers as large as that, where the sum of such numbers may be small."""
    ours, expected = ours.float(), expected.float()
    off = (ours - expected).abs() / expected.abs().clamp(min=least)
    assert off.max() <= ROUNDED, off.max()
    assert (off > 0).float().mean() < (0.02 if CUDA else 0.8)  # the interpreter rounds to bfloat16 by cutting off


@pytest.mark.parametrize("batch", [1, 2])
def test_layer_norm(batch: int, monkeypatch: pytest.MonkeyPatch):
    x, weight, bias = tokens(batch), randn(DIM, seed=1), randn(DIM, seed=2)
    near(layer_norm(x, 1e-6, weight, bias), plainly(lambda: layer_norm(x, 1e-6, weight, bias), monkeypatch))


def runs(batch: int) -> list[tuple[int, int, Modulation]]:
    """A first frame that is modulated otherwise."""
    return [
        (start, end, Modulation(*(randn(batch, 1, DIM, seed=seed + i) for i in range(3))))
        for seed, (start, end) in enumerate(((0, 9), (9, 24)))
    ]


@pytest.mark.parametrize("batch", [1, 2])
def test_modulation_and_gates(batch: int, monkeypatch: pytest.MonkeyPatch):
    x, y, parts = tokens(batch), tokens(batch, seed=5), runs(batch)
    near(modulated_norm(x, parts, 1e-6), plainly(lambda: modulated_norm(x, parts, 1e-6), monkeypatch))
    near(add_gated(x.clone(), y, parts), plainly(lambda: add_gated(x.clone(), y, parts), monkeypatch))


@pytest.mark.parametrize("batch", [1, 2])
def test_rms_norm_and_rotation(batch: int, monkeypatch: pytest.MonkeyPatch):
    norm = RMSNorm(DIM, 1e-6).to(DEVICE).requires_grad_(False)
    norm.weight.copy_(1 + 0.2 * randn(DIM, seed=3))
    x, table = tokens(batch), rope_table(GRID, DIM // HEADS, torch.device(DEVICE))
    near(norm.apply_(x.clone()), plainly(lambda: norm.apply_(x.clone()), monkeypatch))
    near(norm.apply_(x.clone()), norm(x))
    ours = norm.apply_rotated_(x.clone(), table, HEADS)
    expected = plainly(lambda: norm.apply_rotated_(x.clone(), table, HEADS), monkeypatch)
    near(ours, expected, least=4.0 if CUDA else 16.0)
    assert ours.shape == (batch, 24, HEADS, DIM // HEADS)


@pytest.mark.parametrize("kind", [fp8.ACTIVATIONS, int8.Int8()])
def test_quantised_rows(kind, monkeypatch: pytest.MonkeyPatch):
    """Against float32: the CPU's twin in half precision has a scale of its own."""
    x = tokens()[0] * torch.logspace(-3, 2, 24, device=DEVICE)[:, None].bfloat16()
    x[3] = 0
    data, scale = quantised_rows(x, kind)
    exact = kind.pack(x.float())
    torch.testing.assert_close(scale, exact.parts["scale"])
    ours, expected = data.float(), exact.parts["data"].float()
    if kind.dtype == torch.int8:
        assert (ours - expected).abs().max() <= 1
    assert (ours - expected).norm() < (0.005 if CUDA else 0.06) * expected.norm()
    assert (ours != expected).float().mean() < (0.01 if CUDA or kind.dtype == torch.int8 else 0.6)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bfloat16])
@pytest.mark.parametrize("whole", [True, False])
def test_rescaled(dtype: torch.dtype, whole: bool, monkeypatch: pytest.MonkeyPatch):
    product = (1000 * randn(24, 80)).to(dtype)
    of_row, of_column, bias = randn(24, 1, seed=1), randn(1 if whole else 80, 1, seed=2), randn(80, seed=3).bfloat16()
    out = torch.empty(24, 80, dtype=torch.bfloat16, device=DEVICE)
    exact = product.float() * of_row * of_column.view(1, -1)
    near(rescaled(product, of_row, of_column, bias, out), (exact + bias).bfloat16())
    near(rescaled(product, of_row, of_column, None, out), exact.bfloat16())


def test_a_kernel_that_fails_is_said_once_and_pytorch_does_it(monkeypatch: pytest.MonkeyPatch, caplog):
    x, y, parts = tokens(), tokens(seed=5), runs(1)
    expected = plainly(lambda: add_gated(x.clone(), y, parts), monkeypatch)
    with monkeypatch.context() as patch:
        from wan_core.kernels import rows

        def fails(*_):
            raise RuntimeError("no C compiler\nmore")

        patch.setattr(rows, "add_gated_", fails)
        assert all(torch.equal(add_gated(x.clone(), y, parts), expected) for _ in range(2))
    assert caplog.text.count("the kernel add_gated_ cannot be used (RuntimeError: no C compiler)") == 1
    kernels._broken.clear()


def test_no_kernels_with_gradients_or_in_float32():
    x = tokens()[0]
    with torch.inference_mode(False), torch.enable_grad():
        assert not kernels.rms_norm_(x.clone(), randn(DIM), 1e-6)
    assert not kernels.rms_norm_(x.float(), randn(DIM), 1e-6)
