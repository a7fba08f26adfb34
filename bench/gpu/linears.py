"""A block's matrices at the real sizes: half precision beside every packed format, as the layers use them."""

from __future__ import annotations

import torch
from torch import nn

from wan_core.quant.base import Packed
from wan_core.quant.gguf import GGUF, block_type
from wan_core.quant.linear import QuantLinear
from wan_core.quant.registry import MADE_ON_LOAD
from wan_core.quant.scratch import Scratch

from .card import Card, relative

KINDS = ("fp8_e4m3fn", "int8")
BLOCKS = ("Q8_0", "Q4_K")


def rows(card: Card) -> dict:
    shapes = [(64, 256, 512)] if card.quick else [(75600, 5120, 5120), (75600, 5120, 13824), (32760, 13824, 5120)]
    found = {}
    for tokens, inside, outside in shapes:
        found |= compare(card, tokens, inside, outside)
        card.clear()
    return found


def compare(card: Card, tokens: int, inside: int, outside: int) -> dict:
    torch.manual_seed(0)
    x, weight, bias = card.randn(tokens, inside), card.randn(outside, inside) / inside**0.5, card.randn(outside)
    plain = nn.Linear(inside, outside, device="meta")
    plain.weight, plain.bias = (nn.Parameter(value, requires_grad=False) for value in (weight, bias))
    layers: dict[str, nn.Module] = {"plain": plain}
    for name in KINDS:
        layers[name] = packed_layer(MADE_ON_LOAD[name].pack(weight), bias)
    for name in BLOCKS:
        layers[name] = packed_layer(random_blocks(GGUF(name), outside, inside, card.device), bias)
    expected, plain_seconds, found = plain(x), 0.0, {}
    for name, layer in layers.items():
        seconds = card.seconds(lambda layer=layer: layer(x), 5, 2)
        plain_seconds = plain_seconds or seconds
        found[f"{tokens} x {inside} -> {outside}, {name}"] = {
            "ms": seconds * 1e3,
            "tflops": 2 * tokens * inside * outside / seconds / 1e12,
            "over_plain": seconds / plain_seconds,
            "peak_gb": card.peak_gb(lambda layer=layer: layer(x)),
            "difference": relative(layer(x), expected) if name not in BLOCKS else None,
        }
    return found


def packed_layer(packed: Packed, bias: torch.Tensor) -> QuantLinear:
    return QuantLinear(packed, bias, Scratch())


def random_blocks(kind: GGUF, rows: int, columns: int, device: torch.device) -> Packed:
    """A matrix of random blocks: what it costs to unpack does not depend on the numbers."""
    weights, size, _ = block_type(kind.type)
    data = torch.randint(0, 256, (rows, columns // weights * size), dtype=torch.uint8, device=device)
    return Packed(kind, {"data": data})
