"""Pieces of the diffusion transformer: norms, modulation by the timestep, and float32 islands.

In inference the residual stream is updated in place and float32 copies are made slice by slice, so that no
step needs a second copy of the activations. With gradients the same formulas run out of place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

SLICE = 4096  # tokens in one float32 slice


class Modulation(NamedTuple):
    """What the timestep does to one sublayer; each [B, 1, dim], float32."""

    shift: torch.Tensor
    scale: torch.Tensor
    gate: torch.Tensor


@dataclass(frozen=True)
class Timed:
    """Values computed from timesteps, held once for each run of tokens that share one.

    ``bounds[i]`` is the token range [start, end) that ``values[:, i]`` is for. Text-to-video has one run; a clean
    first frame makes two. Nothing is expanded to tokens.
    """

    bounds: tuple[tuple[int, int], ...]
    values: torch.Tensor  # [B, runs, ...]

    def runs(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        for i, (start, end) in enumerate(self.bounds):
            yield start, end, self.values[:, i]


def sinusoid(t: torch.Tensor, dim: int) -> torch.Tensor:
    """Timesteps [...] -> [..., dim] float32, computed in float64 (official ``sinusoidal_embedding_1d``)."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float64, device=t.device) / half
    angles = t.to(torch.float64)[..., None] * torch.pow(10000.0, -exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


def linear_float32(layer: nn.Linear, x: torch.Tensor, parts: int = 1) -> torch.Tensor:
    """A linear layer computed in float32 whatever its weights are stored in, some output rows at a time."""
    if layer.weight.dtype == torch.float32:
        return layer(x)
    weights, biases = layer.weight.chunk(parts), layer.bias.chunk(parts)
    return torch.cat([F.linear(x, w.float(), b.float()) for w, b in zip(weights, biases, strict=True)], dim=-1)


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
        weight = self.weight.float()
        for part in x.split(SLICE, dim=1):
            wide = part.float()
            size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
            inverse = size.square_().div_(x.shape[-1]).add_(self.eps).rsqrt_()
            part.copy_(wide.mul_(inverse).mul_(weight))
        return x


def layer_norm(x: torch.Tensor, eps: float, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Layer norm of x [B, L, dim] in float32, in x's dtype."""
    if x.dtype == torch.float32:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    parts = [F.layer_norm(p.float(), x.shape[-1:], weight, bias, eps).to(x.dtype) for p in x.split(SLICE, dim=1)]
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def modulated_norm(x: torch.Tensor, runs: list[tuple[int, int, Modulation]], eps: float) -> torch.Tensor:
    """``norm(x) * (1 + scale) + shift`` run by run, for x [B, L, dim]."""
    parts = [modulate(x[:, start:end], m.shift, m.scale, eps) for start, end, m in runs]
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    """``norm(x) * (1 + scale) + shift`` for x [B, L, dim], shift and scale [B, 1, dim]."""
    if torch.is_grad_enabled():  # one graph for the batch
        return torch.addcmul(shift, F.layer_norm(x.float(), x.shape[-1:], eps=eps), 1 + scale).to(x.dtype)
    # One fused pass for each sample: the modulation is the norm's own affine.
    samples = [layer_norm(x[i : i + 1], eps, 1 + scale[i, 0], shift[i, 0]) for i in range(len(x))]
    return torch.cat(samples) if len(samples) > 1 else samples[0]


def add_gated(x: torch.Tensor, y: torch.Tensor, runs: list[tuple[int, int, Modulation]]) -> torch.Tensor:
    """``x + y * gate`` run by run in float32; in place without gradients."""
    if torch.is_grad_enabled():
        return torch.cat([_gated(x[:, a:b], y[:, a:b], m.gate) for a, b, m in runs], dim=1)
    for start, end, m in runs:
        for part, update in zip(x[:, start:end].split(SLICE, 1), y[:, start:end].split(SLICE, 1), strict=True):
            if x.dtype == torch.float32:
                part.addcmul_(update, m.gate)
            else:
                part.copy_(_gated(part, update, m.gate))
    return x


def _gated(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(x.float(), y.float(), gate).to(x.dtype)
