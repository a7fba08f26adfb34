"""Pieces of the diffusion transformer: norms, modulation by the timestep, and float32 islands.

In inference the residual stream is updated in place and float32 copies are made slice by slice, so that no
step needs a second copy of the activations. With gradients, and compiled, the same formulas run out of place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ... import kernels
from ...mapped import fetch, is_mapped
from ...quant.scratch import Scratch
from .rope import is_narrow, rotate_

SLICE = 4096  # tokens in one float32 slice
READ_AT_ONCE = 32 * 1024**2  # bytes of a half-precision matrix that are read from its file in one go


def out_of_place() -> bool:
    """Whether nothing may be written over, nor taken apart: for gradients, and for a compiler, which does it better."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


class Modulation(NamedTuple):
    """What the timestep does to one sublayer; each [B, 1, dim], float32."""

    shift: torch.Tensor
    scale: torch.Tensor
    gate: torch.Tensor


@dataclass(frozen=True)
class PerSegment:
    """Values computed from timesteps, held once for each run of tokens that share one.

    ``bounds[i]`` is the token range [start, end) that ``values[:, i]`` is for. Text-to-video has one run; a clean
    first frame makes two. Nothing is expanded to tokens.
    """

    bounds: tuple[tuple[int, int], ...]
    values: torch.Tensor  # [B, runs, ...]

    def segments(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        for i, (start, end) in enumerate(self.bounds):
            yield start, end, self.values[:, i]


def sinusoid(t: torch.Tensor, dim: int) -> torch.Tensor:
    """Timesteps [...] -> [..., dim] float32, computed in float64 (official ``sinusoidal_embedding_1d``).

    Where the device has no float64, on the CPU.
    """
    t = t.cpu() if is_narrow(t.device) else t
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float64, device=t.device) / half
    angles = t.to(torch.float64)[..., None] * torch.pow(10000.0, -exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


class Linear(nn.Linear):
    """A linear layer whose matrix may stay in its mapped file; then it is read at each use, into a shared buffer."""

    may_stay_in_file = True
    scratch: Scratch | None = None  # given where the matrix stays in the file

    @property
    def compiles(self) -> bool:
        return self.scratch is None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] -> [..., out_features]"""
        if self.scratch is None or not is_mapped(self.weight):
            return F.linear(x, self.weight, self.bias)
        if torch.is_grad_enabled():  # backward needs the matrix, when the buffer holds another one
            return F.linear(x, fetch(self.weight), self.bias)
        count = rows_at_once(self.out_features, self.in_features, self.weight.dtype)
        if count >= self.out_features:
            return F.linear(x, self.scratch.fitted(self.weight, like=self.weight), self.bias)
        y = x.new_empty(*x.shape[:-1], self.out_features)
        for start in range(0, self.out_features, count):
            rows = slice(start, start + count)
            weight = self.scratch.fitted(self.weight[rows], like=self.weight)
            y[..., rows] = F.linear(x, weight, None if self.bias is None else self.bias[rows])
        return y


def linear_gelu(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """``gelu(layer(x))``, approximated by tanh; where the device has it, within the product itself."""
    plain = type(layer) is Linear and layer.bias is not None and layer.weight.dtype == x.dtype
    if plain and kernels.suits(x) and layer.weight.device == x.device:
        flat = torch._addmm_activation(layer.bias, x.flatten(0, -2), layer.weight.t(), use_gelu=True)
        return flat.unflatten(0, x.shape[:-1])
    return torch.ops.aten.gelu_(layer(x), approximate="tanh")


def rows_at_once(rows: int, columns: int, dtype: torch.dtype) -> int:
    """How many rows of a matrix in a file are read for one product: all in float32, whose products must be those of a
    matrix in memory to the last bit; in half precision what keeps the buffer small.
    """
    return rows if dtype == torch.float32 else min(rows, max(1, READ_AT_ONCE // (columns * dtype.itemsize)))


def linear_float32(layer: nn.Linear, x: torch.Tensor, parts: int = 1) -> torch.Tensor:
    """A linear layer computed in float32 whatever its weights are stored in, some output rows at a time."""
    if layer.weight.dtype == torch.float32:
        return layer(x)
    weights, biases = layer.weight.chunk(parts), layer.bias.chunk(parts)
    pairs = zip(weights, biases, strict=True)
    return torch.cat([F.linear(x, fetch(w, dtype=torch.float32), b.float()) for w, b in pairs], dim=-1)


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimension (arXiv 1910.07467), computed in float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(x.dtype)

    def apply_(self, x: torch.Tensor) -> torch.Tensor:
        """The same, overwriting x [B, L, dim]."""
        for sample in x:
            if not kernels.rms_norm_(sample, self.weight.float(), self.eps):
                self._apply_(sample)
        return x

    def apply_rotated_(self, x: torch.Tensor, table: torch.Tensor, heads: int) -> torch.Tensor:
        """The same, and each head rotated by a table [L, 1, pairs, 2]: x [B, L, dim] -> [B, L, heads, head_dim]."""
        split = x.unflatten(-1, (heads, -1))
        for i, sample in enumerate(x):
            if not kernels.rms_norm_(sample, self.weight.float(), self.eps, table[:, 0]):
                self._apply_(sample)
                rotate_(split[i : i + 1], table)
        return split

    def _apply_(self, x: torch.Tensor) -> None:
        weight = self.weight.float()
        for part in x.split(SLICE):
            wide = part.float()
            size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
            inverse = size.square_().div_(x.shape[-1]).add_(self.eps).rsqrt_()
            part.copy_(wide.mul_(inverse).mul_(weight))


def layer_norm(x: torch.Tensor, eps: float, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Layer norm of x [B, L, dim] in float32, in x's dtype."""
    if x.dtype == torch.float32 or out_of_place():
        return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).to(x.dtype)
    out = torch.empty_like(x)
    for sample, place in zip(x, out, strict=True):
        _normed_into(place, sample, eps, weight, bias)
    return out


def _normed_into(out: torch.Tensor, x: torch.Tensor, eps: float, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """The same for x [L, dim], into out."""
    if kernels.layer_norm(x, weight, bias, eps, out):
        return
    for part, place in zip(x.split(SLICE), out.split(SLICE), strict=True):
        place.copy_(F.layer_norm(part.float(), x.shape[-1:], weight, bias, eps))


def modulated_norm(x: torch.Tensor, runs: list[tuple[int, int, Modulation]], eps: float) -> torch.Tensor:
    """``norm(x) * (1 + scale) + shift`` run by run, for x [B, L, dim]."""
    if len(runs) == 1 and (out_of_place() or (len(x) == 1 and x.dtype == torch.float32)):
        (_, _, m), *_ = runs
        return modulate(x, m.shift, m.scale, eps)
    if out_of_place():
        return torch.cat([modulate(x[:, start:end], m.shift, m.scale, eps) for start, end, m in runs], dim=1)
    out = torch.empty_like(x)
    for start, end, m in runs:
        for i in range(len(x)):  # the modulation is the norm's own affine
            _normed_into(out[i, start:end], x[i, start:end], eps, 1 + m.scale[i, 0], m.shift[i, 0])
    return out


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    """``norm(x) * (1 + scale) + shift`` for x [B, L, dim], shift and scale [B, 1, dim]."""
    if out_of_place():  # one graph for the batch
        return torch.addcmul(shift, F.layer_norm(x.float(), x.shape[-1:], eps=eps), 1 + scale).to(x.dtype)
    # One fused pass for each sample: the modulation is the norm's own affine.
    samples = [layer_norm(x[i : i + 1], eps, 1 + scale[i, 0], shift[i, 0]) for i in range(len(x))]
    return torch.cat(samples) if len(samples) > 1 else samples[0]


def add_gated(x: torch.Tensor, y: torch.Tensor, runs: list[tuple[int, int, Modulation]]) -> torch.Tensor:
    """``x + y * gate`` run by run in float32; in place without gradients."""
    if out_of_place():
        parts = [_gated(x[:, a:b], y[:, a:b], m.gate) for a, b, m in runs] if len(runs) > 1 else []
        return torch.cat(parts, dim=1) if parts else _gated(x, y, runs[0][2].gate)
    for start, end, m in runs:
        for i in range(len(x)):
            if not kernels.add_gated_(x[i, start:end], y[i, start:end], m.gate[i, 0]):
                _add_gated_(x[i, start:end], y[i, start:end], m.gate[i])
    return x


def _add_gated_(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> None:
    """For x and y [L, dim], gate [1, dim] float32: computed in float32 and rounded once, without float32 copies on a
    GPU; slice by slice for the sake of CPUs, which make them."""
    for part, update in zip(x.split(SLICE), y.split(SLICE), strict=True):
        part.addcmul_(update, gate)


def _gated(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(x.float(), y.float(), gate).to(x.dtype)
