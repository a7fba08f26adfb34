"""What lies between the products of a block: norms, modulation, rotation and gates, as they are and compiled."""

from __future__ import annotations

from collections.abc import Callable

import torch

from wan_core.models.dit.layers import Modulation, RMSNorm, add_gated, modulated_norm
from wan_core.models.dit.rope import rope_table, rotate, rotate_

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
        return rotate_(norm.apply_(value).unflatten(-1, (heads, -1)), table)

    def rotated_plainly(value: torch.Tensor) -> torch.Tensor:
        return rotate(norm(value).unflatten(-1, (heads, -1)), table)

    pairs: dict[str, tuple[Callable, Callable, int]] = {
        "norm and modulation": (lambda: modulated_norm(x, whole, 1e-6), lambda: _modulated(x, *six[:2]), 2),
        "QK norm and rotation": (lambda: rotated(x.clone()), lambda: rotated_plainly(x), 2),
        "gate and residual": (lambda: add_gated(x.clone(), y, whole), lambda: _gated(x, y, six[2]), 3),
    }
    found = {}
    for name, (ours, plain, tensors) in pairs.items():
        contenders = {"ours": ours, "plainly": plain}
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
    copy = card.seconds(lambda: x.clone(), 5, 2)
    found["(of these, the copy that in-place pieces are given)"] = {"ms": copy * 1e3}
    return found


def _modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    wide = torch.nn.functional.layer_norm(x.float(), x.shape[-1:], eps=1e-6)
    return torch.addcmul(shift, wide, 1 + scale).to(x.dtype)


def _gated(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(x.float(), y.float(), gate).to(x.dtype)


def _compiled(call: Callable) -> Callable:
    return torch.compile(call, dynamic=False)
