"""What the card can do at best: a large copy, and a large product of random numbers."""

from __future__ import annotations

import torch

from .card import Card


def rows(card: Card) -> dict:
    side = 256 if card.quick else 8192
    a, b = card.randn(side, side), card.randn(side, side)
    product = card.seconds(lambda: a @ b, 10, 3)
    source = torch.empty(side * side * (8 if card.quick else 32), device=card.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = card.seconds(lambda: target.copy_(source), 10, 3)
    host = torch.empty(len(source) // 8, dtype=torch.uint8, pin_memory=card.is_cuda)
    upload = card.seconds(lambda: target[: len(host)].copy_(host, non_blocking=True), 5, 1)
    return {
        "product": {"tflops": 2 * side**3 / product / 1e12},
        "copy on the device": {"gb_per_s": 2 * len(source) / copy / 1e9},
        "copy from pinned memory": {"gb_per_s": len(host) / upload / 1e9},
    }
