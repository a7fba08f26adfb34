"""Self-attention at the real sizes: PyTorch's kernels, and the packages that are installed."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from wan_core.models.dit.attention import BACKENDS
from wan_core.models.dit.dit import TOKENS_AT_ONCE

from .card import Card, relative
from .shapes import Size, sizes

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def rows(card: Card) -> dict:
    found = {}
    for size in sizes(card):
        found |= sweep(card, size)
        card.clear()
    return found


def sweep(card: Card, size: Size) -> dict:
    heads = size.config.heads
    q, k, v = (card.randn(1, size.tokens, heads, size.config.dim // heads) for _ in range(3))
    expected = F.scaled_dot_product_attention(*(x[:, :, :2].transpose(1, 2).float() for x in (q[:, :512], k, v)))
    found = {}
    for name, call in contenders(card).items():
        row = f"{size.name}, {size.tokens} tokens, {name}"
        try:
            answer = call(q, k, v)
            seconds = card.seconds(lambda call=call: call(q, k, v), 3, 0)
        except Exception as error:
            found[row] = {"not_measured": str(error).splitlines()[0][:160]}
            continue
        found[row] = {
            "ms": seconds * 1e3,
            "tflops": 4 * size.tokens**2 * size.config.dim / seconds / 1e12,
            "error": relative(answer[:, :512, :2].transpose(1, 2), expected),
        }
    return found


def contenders(card: Card) -> dict[str, Callable[..., torch.Tensor]]:
    found: dict[str, Callable[..., torch.Tensor]] = {"sdpa": BACKENDS["sdpa"].run, "sdpa in parts": _in_parts}
    if card.is_cuda:
        for name, kernel in KERNELS.items():
            found[name] = lambda q, k, v, kernel=kernel: _with(kernel, q, k, v)
        found["cudnn in parts"] = lambda q, k, v: _parts(lambda part: _with(KERNELS["cudnn"], part, k, v), q)
    for name, backend in BACKENDS.items():
        if name != "sdpa" and backend.installed and backend.fits(card.device, card.dtype):
            found[name] = lambda q, k, v, run=backend.run: run(q, k, v, kind="self")
    return found


def _with(kernel: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(kernel):
        return BACKENDS["sdpa"].run(q, k, v)


def _in_parts(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return _parts(lambda part: BACKENDS["sdpa"].run(part, k, v), q)


def _parts(call: Callable[[torch.Tensor], torch.Tensor], q: torch.Tensor) -> torch.Tensor:
    return torch.cat([call(part) for part in q.split(TOKENS_AT_ONCE, dim=1)], dim=1)
