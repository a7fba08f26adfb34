"""What lies between the products of a block: norms, modulation, rotation and gates, as they are and compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from unittest import mock

import torch

from wan_core import kernels
from wan_core.models.dit.dit import TOKENS_AT_ONCE
from wan_core.models.dit.layers import Linear, Modulation, RMSNorm, add_gated, linear_gelu, modulated_norm
from wan_core.models.dit.rope import rope_table, rotate

from .card import Card, relative
from .shapes import Size, sizes


def rows(card: Card) -> dict:
    found = {}
    for size in sizes(card)[:1]:
        found |= compare(card, size)
    return found


def compare(card: Card, size: Size) -> dict:
    dim, heads, tokens = size.config.dim, size.config.heads, size.tokens
    torch.manual_seed(0)
    x, y = (card.randn(1, tokens, dim) for _ in range(2))
    six = [card.randn(1, 1, dim, dtype=torch.float32) for _ in range(3)]
    whole = [(0, tokens, Modulation(*six))]
    norm = RMSNorm(dim, 1e-6).to(card.device).requires_grad_(False)
    norm.weight.fill_(1.5)
    frames, height, width = size.latent
    table = rope_table((frames, height // 2, width // 2), dim // heads, card.device)

    def rotated(value: torch.Tensor) -> torch.Tensor:
        return norm.apply_rotated_(value, table, heads)

    def rotated_plainly(value: torch.Tensor) -> torch.Tensor:
        return rotate(norm(value).unflatten(-1, (heads, -1)), table)

    pairs: dict[str, tuple[Callable, Callable, int]] = {
        "norm and modulation": (lambda: modulated_norm(x, whole, 1e-6), lambda: _modulated(x, *six[:2]), 2),
        "QK norm and rotation": (lambda: rotated(x.clone()), lambda: rotated_plainly(x), 2),
        "gate and residual": (lambda: add_gated(x.clone(), y, whole), lambda: _gated(x, y, six[2]), 3),
    }
    found = {}
    for name, (ours, plain, tensors) in pairs.items():
        contenders = {"ours": ours, "ours without kernels": partial(without_kernels, ours), "plainly": plain}
        if card.is_cuda and name != "QK norm and rotation":
            contenders["compiled"] = _compiled(plain)
        expected = ours()
        for label, call in contenders.items():
            seconds = card.seconds(call, 5, 2)
            found[f"{size.name}, {name}, {label}"] = {
                "ms": seconds * 1e3,
                "gb_per_s_at_least": tensors * x.nbytes / seconds / 1e9,
                "difference": relative(call(), expected),
            }
    found |= widening(card, size, x)
    copy = card.seconds(lambda: x.clone(), 5, 2)
    found["(of these, the copy that in-place pieces are given)"] = {"ms": copy * 1e3}
    return found


def widening(card: Card, size: Size, x: torch.Tensor) -> dict:
    """The feed-forward's first product with its GELU, some tokens at a time as a block does it."""
    layer, found = Linear(size.config.dim, size.config.ffn_dim).to(card.device, card.dtype).requires_grad_(False), {}
    part = x[:, :TOKENS_AT_ONCE]
    expected = without_kernels(lambda: linear_gelu(layer, part))
    calls = {
        "ours": lambda: linear_gelu(layer, part),
        "apart": lambda: without_kernels(lambda: linear_gelu(layer, part)),
    }
    for label, call in calls.items():
        ms = card.seconds(call, 5, 2) * 1e3
        found[f"{size.name}, a part's GELU, {label}"] = {"ms": ms, "difference": relative(call(), expected)}
    return found


def without_kernels(call: Callable) -> torch.Tensor:
    with mock.patch.object(kernels, "available", lambda device: False):
        return call()


def _modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    wide = torch.nn.functional.layer_norm(x.float(), x.shape[-1:], eps=1e-6)
    return torch.addcmul(shift, wide, 1 + scale).to(x.dtype)


def _gated(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(x.float(), y.float(), gate).to(x.dtype)


def _compiled(call: Callable) -> Callable:
    return torch.compile(call, dynamic=False)
